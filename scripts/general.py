"""Texts without labels, from which a student learns what its teacher knows of language."""

import copy
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_prune.errors import DataError


def read_general(path: str) -> list[str]:
    """The lines of a file that hold something.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--general_file cannot be read: {error}") from error
    return [line for line in lines if line.strip()]


def general_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Token ids of texts; those that are too long become several rows.

    Args:
        texts: without labels.
        tokenizer: of the model. One without a Rust core cuts what is too long off.
        max_length: tokens of a row at most.

    Raises:
        DataError: when there are none.
    """
    if not texts:
        raise DataError("there are no texts without labels: name a file with --general_file.")
    coded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=tokenizer.is_fast,
    )
    return Dataset.from_dict({name: coded[name] for name in tokenizer.model_input_names})


def general_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """What makes batches of such rows; without a token for padding, with that of the end."""
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.pad_token or padding.eos_token
    return DataCollatorWithPadding(padding)

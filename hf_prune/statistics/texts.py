"""Texts from a file, with or without labels: lines, or rows of a table."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, DataError
from hf_prune.recipe import did_you_mean

TABLES: dict[str, tuple[str, dict[str, str]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""By the end of a name, how `datasets` reads such a table. All other files are lines of text."""


@dataclass(frozen=True)
class Examples:
    """Texts in a file, and which of them are used.

    Attributes:
        file: UTF-8 text, of which empty lines are skipped; or a table, by its name: `.csv`, `.tsv`,
            `.json`, `.jsonl` or `.parquet`.
        text_column: of a table.
        label_column: of a table; None, if labels are not wanted.
        max_samples: the first lines at most; or rows at even distances, since tables are often
            sorted by label.
        max_length: tokens of a text at most.
    """

    file: Path
    text_column: str = "text"
    label_column: str | None = None
    max_samples: int = 128
    max_length: int = 128


def read_examples(examples: Examples) -> tuple[list[str], list[Any] | None]:
    """Texts, and what stands in the column of labels.

    Raises:
        ConfigError: when labels are asked of lines.
        DataError: when there is no text, or a table cannot be read or lacks a column or a text.
    """
    file, text_column = examples.file, examples.text_column
    label_column, most = examples.label_column, examples.max_samples
    if file.suffix.lower() not in TABLES:
        if label_column is not None:
            raise ConfigError(
                f"{file} is text without columns. Labels need a table: {', '.join(TABLES)}."
            )
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{file} has no line of text.")
        return lines[:most], None
    with tempfile.TemporaryDirectory() as folder:
        rows = _table(file, folder)
        for name in (text_column, label_column):
            if name is not None and name not in rows.column_names:
                end = did_you_mean(name, rows.column_names)
                raise DataError(f"{file} has no column {name!r}{end}")
        count = min(most, len(rows))
        rows = rows.select([at * len(rows) // count for at in range(count)])
        texts = list(rows[text_column])
        labels = None if label_column is None else list(rows[label_column])
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{file}: row {row} of those that are used has no {text_column!r}.")
    return texts, labels


def _table(file: Path, folder: str) -> Dataset:
    """The rows of a table, in memory."""
    kind, options = TABLES[file.suffix.lower()]
    try:
        rows = load_dataset(
            kind,
            data_files=str(file),
            split="train",
            cache_dir=folder,
            keep_in_memory=True,
            **options,
        )
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{file} cannot be read as {kind}: {reason}.") from error
    assert isinstance(rows, Dataset)  # noqa: S101  # one split was asked for
    if not len(rows):
        raise DataError(f"{file} has no row.")
    return rows


def class_numbers(model: PreTrainedModel, values: Sequence[Any]) -> Tensor:
    """Labels as the loss of a classifier of sequences wants them, `[n]`.

    Args:
        model: with the names of its classes in its config.
        values: numbers of classes, or their names; any numbers for models of one number.

    Raises:
        ConfigError: when the model is not a classifier of whole texts into one of several classes.
        DataError: naming the first label that the model does not know.
    """
    config = model.config
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    if not type(model).__name__.endswith("ForSequenceClassification") or several:
        raise ConfigError(
            f"{type(model).__name__} does not say one class of a text: leave the labels out."
        )
    names = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    classes = int(config.num_labels or 0)
    found: list[float] = []
    for row, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        known = names.get(value) if isinstance(value, str) else value
        if classes == 1 and number and value == value:
            found.append(float(value))
        elif isinstance(known, int) and 0 <= known < classes and classes > 1:
            found.append(known)
        else:
            raise DataError(
                f"row {row} of those that are used: label {value!r} is neither a number in "
                f"[0, {classes}) nor the name of a class{did_you_mean(str(value), list(names))}"
            )
    return torch.tensor(found) if classes == 1 else torch.tensor(found).long()

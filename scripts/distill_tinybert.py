"""Distil a teacher into a small student of any depth and width, in the steps of TinyBERT.

    accelerate launch scripts/distill_tinybert.py    # packaged teacher and data, offline
    accelerate launch scripts/distill_tinybert.py --augment_copies 4 \
        --masked_model google-bert/bert-base-uncased --general_file wikipedia.txt

The recipe fine-tunes the teacher, makes a student of parts of it (or at random), and teaches it
language in general on texts without labels, then the task in two steps: what is inside, then what
it predicts. With `--augment_copies` the student also learns
from variants of each text. Source: Jiao et al. 2019, arXiv:1909.10351.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from arguments import Arguments
from datasets import DatasetDict
from job import Job
from launch import RECIPES, Packaged, launch
from packaged import film_plots, packaged_model
from prune_bert import NAMES, packaged_data
from transformers import AutoModelForMaskedLM

from hf_prune.errors import DataError
from hf_prune.training.augment import Augmenter, augment


@dataclass
class TinyBertArguments(Arguments):
    """The same, with the defaults of this script and those of augmentation."""

    recipe: str = field(
        default=str(RECIPES / "bert" / "tinybert.yaml"),
        metadata={"help": "YAML file with the stages."},
    )
    output_dir: str = field(default="runs/distill_tinybert", metadata={"help": "Where results go."})
    augment_copies: int = field(default=0, metadata={"help": "Variants of each text."})
    augment_probability: float = field(default=0.4, metadata={"help": "Of replacing a word."})
    augment_candidates: int = field(default=15, metadata={"help": "Replacements to draw from."})
    masked_model: str | None = field(
        default=None,
        metadata={"help": "Masked language model with the teacher's tokens; default: neighbours."},
    )


def prepare(job: Job) -> None:
    """Let the data grow, after the teacher has been fine-tuned on what is real.

    Raises:
        DataError: when the data holds no texts to change.
    """
    a: Any = job.arguments
    if not a.augment_copies:
        return
    if job.task.name != "text-classification":
        raise DataError("augmentation is for text-classification.")
    masked = None
    if a.masked_model is not None:
        masked = AutoModelForMaskedLM.from_pretrained(a.masked_model).eval()
    table = job.model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)  # noqa: S101  # what every embedding has
    augmenter = Augmenter(
        job.tokenizer,
        table.detach().clone(),
        masked,
        candidates=a.augment_candidates,
        probability=a.augment_probability,
        seed=job.recipe.seed,
    )
    rows = augment(job.raw["train"], augmenter, (job.columns.text,), a.augment_copies)
    job.student_rows = job.encode(DatasetDict({"train": rows}))["train"]


if __name__ == "__main__":
    packaged = Packaged(packaged_model, packaged_data, NAMES, film_plots)
    launch("distill_tinybert.py", TinyBertArguments, packaged, prepare)

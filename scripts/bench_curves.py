"""Loss curves with gradient accumulation 1, 2 and 4, on one and on two processes.

The same batch of 16 examples makes each optimizer step, however it is divided. Transformers 5
trains classifiers that ignore `num_items_in_batch` with a loss that grows with accumulation and
with processes, which `prepare_trainer` puts right; rows `as it comes` are without it.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import PartialState, debug_launcher
from bench_rows import Rows
from datasets import Dataset
from tiny_training import STEPS, rows_of, texts_of, tiny_bert, tiny_gpt2
from transformers import Trainer, TrainingArguments

from hf_prune import DistillCallback, PruneCallback, prepare_trainer

BATCH = 16
DIVISIONS = tuple((steps, processes) for processes in (1, 2) for steps in (1, 2, 4))
"""Micro-batches of a step, and processes."""
RECIPE = {
    "stages": [
        {
            "stage": "prune",
            "criterion": "taylor",
            "solver": "global",
            "sparsity": 0.5,
            "schedule": {"every": 2, "end": 0.7},
        },
        {"stage": "train"},
    ]
}


def _job(folder: str, kind: str, accumulation: int, prepared: bool) -> None:
    """What each process does; the curve and the plan go to a file of its own."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    make = tiny_bert if kind == "classifier" else tiny_gpt2
    data = rows_of(96) if kind == "classifier" else texts_of(96)
    student: Any = make(dropout=0.0)
    pruning = PruneCallback(RECIPE)
    arguments = TrainingArguments(
        f"{folder}/trainer",
        per_device_train_batch_size=BATCH // accumulation // state.num_processes,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [pruning, DistillCallback(make(seed=1, dropout=0.0), alpha=0.5)]
    rows = Dataset.from_dict(data)
    trainer = Trainer(student, arguments, train_dataset=rows, callbacks=callbacks)
    if prepared:
        prepare_trainer(trainer)
    trainer.train()
    assert pruning.plan is not None  # noqa: S101  # training has ended
    found = {
        "processes": state.num_processes,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "plan": pruning.plan.fingerprint(),
    }
    Path(folder, f"{state.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


def curve(kind: str, accumulation: int, processes: int, *, prepared: bool) -> dict[str, Any]:
    """The losses of all steps, and the plan, of one training.

    Args:
        kind: `classifier`, or `language model` with sequences of many lengths.
        accumulation: micro-batches of a step.
        processes: under DistributedDataParallel, if more than one.
        prepared: whether `prepare_trainer` has seen the Trainer.
    """
    with tempfile.TemporaryDirectory() as folder:
        debug_launcher(_job, args=(folder, kind, accumulation, prepared), num_processes=processes)
        found = [
            json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(processes)
        ]
    if any(each["processes"] != processes or each["plan"] != found[0]["plan"] for each in found):
        raise SystemExit("the processes did not train together, or decided differently.")
    return dict(found[0])


def compared(this: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """A training beside the undivided one: largest relative difference of a loss, and the plan."""
    ratios = [a / b for a, b in zip(this["losses"], first["losses"], strict=True)]
    return {
        "ratio": sum(ratios) / len(ratios),
        "loss_difference": max(abs(ratio - 1) for ratio in ratios),
        "same_plan": this["plan"] == first["plan"],
        "losses": this["losses"],
    }


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(out: Path) -> None:
    """Loss curves however a batch is divided, written to OUT."""
    torch.set_num_threads(1)
    rows = Rows(out)
    for kind in ("classifier", "language model"):
        for prepared in (True, False):
            first = curve(kind, 1, 1, prepared=True)
            for accumulation, processes in DIVISIONS:
                how = "prepared" if prepared else "as it comes"
                key = f"{kind}, {how}: accumulation {accumulation}, processes {processes}"
                if key not in rows:
                    this = curve(kind, accumulation, processes, prepared=prepared)
                    rows.add(key, compared(this, first))
                    sys.stdout.flush()

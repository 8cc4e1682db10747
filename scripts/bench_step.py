"""What a training step with PruneCallback costs over one without: of units, and of single weights.

The packaged MiniLM-L6, AdamW, batches of 32 sequences of 32 tokens; steps with and without in turn.
Processor time, since the machine may be busy.
"""

import copy
import time
from functools import partial
from pathlib import Path

import click
import torch
from bench_rows import Rows, in_turn
from packaged import packaged_model
from transformers import AutoModelForSequenceClassification

from hf_prune.recipe import Prune, Schedule
from hf_prune.statistics.example import example_batch
from hf_prune.training.structure import StructuredPruning
from hf_prune.training.zeros import WeightPruning

ROUNDS = 25


def step_cost() -> dict[str, dict[str, float]]:
    """Processor milliseconds of a training step: bare, gates open, and half of them closed.

    Scores are read in each, but for `after_schedule`, when nothing is left to decide. Of single
    weights nine tenths are kept at zero, with (`movement`) or without (`zeros`) scores.
    """
    bare = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=2)
    models = {name: copy.deepcopy(bare).train() for name in ("bare", "gated", "sparse")}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()
    }
    batch = {**example_batch(bare, 32, 32), "labels": torch.arange(32) % 2}
    pruning = StructuredPruning(
        Prune(criterion="taylor", sparsity=0.5, schedule=Schedule()), seed=0
    )

    weights = WeightPruning(
        Prune(units=("weights",), criterion="movement", sparsity=0.9, schedule=Schedule())
    )
    parts: dict[str, StructuredPruning | WeightPruning] = {"gated": pruning, "sparse": weights}

    def step(name: str, *, observed: bool = False) -> float:
        start = time.process_time()
        models[name](**batch).loss.backward()
        if observed:
            parts[name].observe()
        optimizers[name].step()
        if name in parts:
            parts[name].after_step()
        optimizers[name].zero_grad()
        return (time.process_time() - start) * 1e3

    pruning.start(models["gated"])
    step("gated", observed=True)
    pruning.decide(1.0)
    weights.start(models["sparse"])
    step("sparse", observed=True)
    weights.decide(1.0)
    closed = pruning.gates.values

    def gated(values: dict[str, torch.Tensor], *, observed: bool) -> float:
        pruning.gates.values = values
        return step("gated", observed=observed)

    states = {
        "bare": partial(step, "bare"),
        "open_gates": partial(gated, {}, observed=True),
        "closed_gates": partial(gated, closed, observed=True),
        "after_schedule": partial(gated, closed, observed=False),
        "movement": partial(step, "sparse", observed=True),
        "zeros": partial(step, "sparse", observed=False),
    }
    return in_turn(states, rounds=ROUNDS, warm_up=3)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(out: Path) -> None:
    """A training step with PruneCallback over one without, written to OUT."""
    torch.set_num_threads(1)
    rows = Rows(out)
    for name, row in step_cost().items():
        rows.add(name, row)

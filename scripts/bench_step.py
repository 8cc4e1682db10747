"""What a training step with PruneCallback costs over one without.

The packaged MiniLM-L6, AdamW, batches of 32 sequences of 32 tokens; steps with and without in turn.
Processor time, since the machine may be busy.
"""

import copy
import json
import statistics
import time
from pathlib import Path

import click
import torch
from packaged import packaged_model
from transformers import AutoModelForSequenceClassification

from hf_prune.measure.counts import example_batch
from hf_prune.recipe import Prune, Schedule
from hf_prune.report.result import environment
from hf_prune.training.structure import StructuredPruning

ROUNDS = 25


def step_cost() -> dict[str, object]:
    """Processor milliseconds of a training step: bare, gates open, and half of them closed.

    Scores are read in each, but for `after_schedule`, when nothing is left to decide.
    """
    bare = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=2)
    models = {"bare": bare.train(), "gated": copy.deepcopy(bare).train()}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()
    }
    batch = {**example_batch(bare, 32, 32), "labels": torch.arange(32) % 2}
    pruning = StructuredPruning(
        Prune(criterion="taylor", sparsity=0.5, schedule=Schedule()), seed=0
    )

    def step(name: str, *, observed: bool = False) -> float:
        start = time.process_time()
        models[name](**batch).loss.backward()
        if observed:
            pruning.observe()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return (time.process_time() - start) * 1e3

    pruning.start(models["gated"])
    step("gated", observed=True)
    pruning.decide(1.0)
    closed = pruning.gates.values
    states = ("bare", "open_gates", "closed_gates", "after_schedule")
    times: dict[str, list[float]] = {name: [] for name in states}
    for turn in range(ROUNDS + 3):
        for name in states:
            pruning.gates.values = {} if name == "open_gates" else closed
            observed = name in ("open_gates", "closed_gates")
            elapsed = step("bare" if name == "bare" else "gated", observed=observed)
            if turn >= 3:
                times[name].append(elapsed)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, times["bare"], strict=True))
        for name, values in times.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"median_ms": medians, "ratio_to_bare": ratios, "rounds": ROUNDS}


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(out: Path) -> None:
    """A training step with PruneCallback over one without, written to OUT."""
    torch.set_num_threads(1)
    report = {"environment": environment(), "step": step_cost()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["step"], indent=1))

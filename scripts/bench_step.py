"""What a training step with PruneCallback costs over one without.

The packaged MiniLM-L6, AdamW, batches of 32 sequences of 32 tokens; steps with and without in turn.
Processor time, since the machine may be busy.
"""

import json
import statistics
import time
from pathlib import Path

import click
import torch
from packaged import packaged_model
from transformers import AutoModelForSequenceClassification

from hf_prune.gates import attach_gates
from hf_prune.measure.counts import example_batch
from hf_prune.recipe import Prune, Schedule
from hf_prune.report.result import environment
from hf_prune.training.structure import StructuredPruning

ROUNDS = 25


def step_cost() -> dict[str, object]:
    """Processor milliseconds of a training step: bare, gates open, and half of them closed."""
    model = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = {**example_batch(model, 32, 32), "labels": torch.arange(32) % 2}
    pruning = StructuredPruning(
        Prune(criterion="taylor", sparsity=0.5, schedule=Schedule()), seed=0
    )

    def step(*, pruned: bool) -> float:
        start = time.process_time()
        model(**batch).loss.backward()
        if pruned:
            pruning.observe()
        optimizer.step()
        optimizer.zero_grad()
        return (time.process_time() - start) * 1e3

    times: dict[str, list[float]] = {"bare": [], "open_gates": [], "closed_gates": []}
    pruning.start(model)
    step(pruned=True)
    pruning.decide(1.0)
    closed = pruning.gates.values
    pruning.gates.remove()
    for turn in range(ROUNDS + 3):
        for name in times:
            if name != "bare":
                pruning.gates = attach_gates(model, pruning.sites)
                pruning.gates.values = closed if name == "closed_gates" else {}
            elapsed = step(pruned=name != "bare")
            pruning.gates.remove()
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

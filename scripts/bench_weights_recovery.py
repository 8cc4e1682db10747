"""Single weights of a fine-tuned classifier, before and after an epoch in which zeros stay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from bench_rows import Rows
from bench_training import start, variant, with_options
from bench_weights_text import IGNORE, STAGES
from job import Job

from hf_prune.measure.counts import count_nonzero, count_parameters
from hf_prune.recipe import Prune, Train

METHODS = (
    *("admm, knapsack", "sparsegpt", "wanda", "magnitude"),
    *("wanda, re-fitted", "magnitude, re-fitted", "fisher_diagonal", "random"),
)
"""What is compared, most telling first; each stage is one of `bench_weights_text`."""
LEVELS = ("0.9", "2:4", "0.95", "0.8", "0.7", "0.5")
"""Most telling first."""


def _stage(method: str, level: str) -> Prune:
    fields = dict(STAGES[method])
    if ":" not in level:
        return Prune(units=("weights",), ignore=IGNORE, sparsity=float(level), **fields)
    fields.pop("solver", None)  # a pattern says by itself how much goes where
    fields["weights"] = {**fields.get("weights", {}), "pattern": level}
    return Prune(units=("weights",), ignore=IGNORE, **fields)


def _row(job: Job, rows: Rows, title: str) -> dict[str, Any]:
    accuracy = job.score(job.model)
    dense = rows.data["rows"][f"{title} dense"]["accuracy"]
    row: dict[str, Any] = {"accuracy": accuracy, "kept_of_dense": accuracy / dense}
    return row | {"nonzero_of_dense": count_nonzero(job.model) / count_parameters(job.model)}


@click.command(help=__doc__)
@with_options
@click.option("--method", multiple=True, type=click.Choice(METHODS), default=METHODS)
@click.option("--level", multiple=True, type=click.Choice(LEVELS), default=LEVELS)
def command(
    out: Path, epochs: float, method: Sequence[str], level: Sequence[str], **how: Any
) -> None:
    """Prune, measure, train with masks, measure again."""
    rows, job, title = start(out, **how)
    for name in method:
        for wanted in level:
            key = f"{title} {wanted} {name}"
            if f"{key}, recovered" in rows:
                continue
            run = variant(job)
            run.prune(_stage(name, wanted))
            rows.add(key, _row(run, rows, title))
            run.train(Train(num_train_epochs=epochs, learning_rate=1e-4), (), 1)
            rows.add(f"{key}, recovered", _row(run, rows, title))

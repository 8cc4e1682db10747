"""What recovers a pruned model best: ways to prune while learning, and students of a teacher.

Every way starts from the same fine-tuned model and takes the same number of steps. The dense model
is measured in the same run, and so is the latency of every result, in turn with the dense one.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from job import Arguments, Job
from packaged import packaged_model, rotten_tomatoes

from hf_prune import Recipe
from hf_prune.measure.latency import compare_latency
from hf_prune.plan import Plan
from hf_prune.recipe import Distill, Prune, Schedule, Student, Train
from hf_prune.report.result import environment, measure_stage

METHODS = ("one_shot", "gradual", "movement", "l0")
SIZES = {"layers": 3, "hidden": 192, "heads": 6, "neurons": 768}
"""Of the student: half the depth and half the width of MiniLM-L6."""


def _fine_tuned(model: str | None, samples: int, tested: int, seed: int) -> Job:
    arguments = Arguments(max_train_samples=samples, max_eval_samples=tested, max_length=64)
    first = Train(num_train_epochs=1.0, learning_rate=1e-4, warmup_steps=20)
    recipe = Recipe(seed=seed, stages=(first,))
    job = Job(arguments, recipe, model or packaged_model(), rotten_tomatoes(seed))
    job.train(first, None, 0)
    job.dense = job.model.eval()
    return job


def _variant(job: Job) -> Job:
    """The same data and dense model, with nothing done yet."""
    other = copy.copy(job)
    other.model = copy.deepcopy(job.model)
    other.plan, other.masks = Plan(other.model.config.model_type), {}
    other.report = copy.deepcopy(job.report)
    return other


def _prune(method: str, sparsity: float, length: int) -> Prune:
    common: dict[str, Any] = {"sparsity": sparsity, "of": "layers", "sequence_length": length}
    if method == "one_shot":
        return Prune(**common)
    common["masks"] = {"gradual": "scored", "movement": "movement", "l0": "l0"}[method]
    schedule = Schedule(every=1 if method == "l0" else 10, end=0.6)
    return Prune(**common, criterion="taylor", solver="global", schedule=schedule)


def _recovery(job: Job, epochs: float, *, taught: bool) -> Train:
    fields: dict[str, Any] = {"num_train_epochs": epochs, "learning_rate": 1e-4}
    return Distill(**fields, temperature=2.0, alpha=0.9) if taught else Train(**fields)


def _figures(job: Job, length: int, rounds: int) -> dict[str, Any]:
    assert job.dense is not None  # noqa: S101  # set when it was fine-tuned
    models = {"dense": job.dense, "this": job.model}
    times = compare_latency(models, batch_size=32, sequence_length=length, rounds=rounds)
    counts = measure_stage(job.model, length)
    return {
        "accuracy": job.score(job.model),
        "parameters": counts["parameters"],
        "encoder_parameters": counts["encoder_parameters"],
        "macs": counts["macs"],
        "latency_ms": times["this"].median_ms,
        "speedup": times["dense"].median_ms / times["this"].median_ms,
    }


def _method(job: Job, method: str, sparsity: float, epochs: float, *, taught: bool) -> Job:
    run = _variant(job)
    stage = _prune(method, sparsity, 64)
    recovery = _recovery(run, epochs, taught=taught)
    if method == "one_shot":
        run.prune(stage)
        run.train(recovery, None, 1)
    else:
        run.train(recovery, stage, 1)
    return run


def _student(job: Job, init: str, epochs: float, *, taught: bool) -> Job:
    run = _variant(job)
    run.report["stages"] = {}
    run.make_student(Student(**SIZES, init=init))  # type: ignore[arg-type]  # checked when it is made
    if taught:
        fields: dict[str, Any] = {"hidden": 1.0, "embeddings": 1.0, "attention": 1.0}
        inner = Distill(
            num_train_epochs=epochs / 2, learning_rate=3e-4, alpha=1.0, logits=0.0, **fields
        )
        run.train(inner, None, 1)
        outer = Distill(num_train_epochs=epochs / 2, learning_rate=1e-4, alpha=1.0, temperature=1.0)
        run.train(outer, None, 2)
    else:
        run.train(Train(num_train_epochs=epochs, learning_rate=1e-4), None, 1)
    return run


def _write(out: str, report: dict[str, Any]) -> None:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"environment": environment(), **report}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


_options = (
    click.argument("out"),
    click.option("--model", default=None, help="Folder of the model; default: the packaged one."),
    click.option("--samples", default=2000, show_default=True, help="Examples to learn from."),
    click.option("--epochs", default=1.0, show_default=True, help="Of every recovery."),
    click.option("--test-samples", default=0, show_default=True, help="To measure on; 0 = all."),
    click.option("--seeds", default=1, show_default=True, help="How often all of it is done."),
)


def _with_options(function: Any) -> Any:
    for option in reversed(_options):
        function = option(function)
    return function


@click.command(help=__doc__)
@_with_options
@click.option("--sparsity", multiple=True, type=float, default=(0.5, 0.75), show_default=True)
def methods(
    out: str,
    model: str | None,
    samples: int,
    epochs: float,
    test_samples: int,
    seeds: int,
    sparsity: Sequence[float],
) -> None:
    """One-shot, gradual, movement and L0, each with and without a teacher."""
    rows = []
    for seed in range(seeds):
        job = _fine_tuned(model, samples, test_samples, seed)
        dense = _figures(job, 64, 5)
        rows.append({"seed": seed, "method": "dense", **dense})
        for fraction in sparsity:
            for method in METHODS:
                for taught in (False, True):
                    run = _method(job, method, fraction, epochs, taught=taught)
                    found = _figures(run, 64, 5)
                    kept = {"accuracy_kept": found["accuracy"] / dense["accuracy"]}
                    what = {"seed": seed, "method": method, "sparsity": fraction, "taught": taught}
                    rows.append({**what, **found, **kept})
                    _write(out, {"samples": samples, "epochs": epochs, "rows": rows})
                    click.echo(json.dumps(rows[-1]))


@click.command(help=__doc__)
@_with_options
def students(
    out: str, model: str | None, samples: int, epochs: float, test_samples: int, seeds: int
) -> None:
    """A TinyBERT-style student by its start, and without a teacher; equal steps."""
    rows = []
    for seed in range(seeds):
        job = _fine_tuned(model, samples, test_samples, seed)
        rows.append({"seed": seed, "student": "dense", **_figures(job, 64, 5)})
        for init, taught in (
            ("teacher", True),
            ("normal", True),
            ("xavier", True),
            ("teacher", False),
            ("normal", False),
        ):
            torch.manual_seed(seed)
            run = _student(job, init, epochs, taught=taught)
            rows.append({"seed": seed, "student": init, "taught": taught, **_figures(run, 64, 5)})
            _write(out, {"samples": samples, "epochs": epochs, "sizes": SIZES, "rows": rows})
            click.echo(json.dumps(rows[-1]))

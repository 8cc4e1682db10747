"""What recovers a pruned model best: ways to prune while learning, and students of a teacher.

Every way starts from the same fine-tuned model and takes the same number of steps. The dense model
is measured in the same run, and so is the latency of every result, in turn with the dense one.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from arguments import Arguments
from bench_rows import Rows
from job import Job
from packaged import packaged_model, reuters_r8, rotten_tomatoes

from hf_prune import Recipe, cache_logits
from hf_prune.measure.latency import compare_latency
from hf_prune.plan import Plan
from hf_prune.recipe import Distill, Prune, Schedule, Student, Target, Train
from hf_prune.report.result import measure_stage

METHODS = ("one_shot", "calibrated", "gradual", "movement", "l0", "l0_coarse", "l0_hidden")
"""`gradual` is scored by gradients of training, `calibrated` by the step of `one_shot`."""
SIZES = {"layers": 3, "hidden": 192, "heads": 6, "neurons": 768}
"""Of the student: half the depth and half the width of MiniLM-L6."""
TEACHINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "": ({},),
    " taught": ({"alpha": 0.5, "temperature": 2.0},),
    " taught in two steps": (
        {"alpha": 1.0, "logits": 0.0, "hidden": 1.0, "embeddings": 1.0, "attention": 1.0},
        {"alpha": 0.5, "temperature": 2.0},
    ),
}
"""Of students, by what it adds to the name of a row: the stages, of which `{}` has no teacher. The
two steps are those of TinyBERT, what is inside first; each takes half of the training steps."""
STUDENTS = (
    ("teacher", " taught"),
    ("teacher", ""),
    ("normal", " taught"),
    ("normal", ""),
    ("teacher", " taught in two steps"),
    ("normal", " taught in two steps"),
    ("xavier", " taught"),
)
"""How a student starts, and how it is taught."""
NAMES = [f"{init}{teaching}" for init, teaching in STUDENTS]
TOKENS = {"rotten-tomatoes": 64, "reuters-r8": 96}
"""Of each text, at most."""
BATCH = 32
"""Sequences at once, when time is asked for and measured."""


def _fine_tuned(model: str | None, data: str, samples: int, tested: int, seed: int) -> Job:
    """The dense model: the one that is given, or the packaged one after an epoch."""
    arguments = Arguments(
        max_train_samples=samples, max_eval_samples=tested, max_length=TOKENS[data]
    )
    first = Train(num_train_epochs=1.0, learning_rate=1e-4, warmup_steps=20)
    recipe = Recipe(seed=seed, stages=(first,))
    rows = rotten_tomatoes(seed) if data == "rotten-tomatoes" else reuters_r8()
    torch.manual_seed(seed)  # a new head is drawn while the model is loaded
    job = Job(arguments, recipe, model or packaged_model(), rows)
    if model is None:
        job.train(first, (), 0)
    job.dense = job.model.eval()
    return job


def variant(job: Job) -> Job:
    """The same data and dense model, with nothing done yet."""
    other = copy.copy(job)
    other.model = copy.deepcopy(job.model)
    other.plan, other.masks = Plan(other.model.config.model_type), {}
    other.report = copy.deepcopy(job.report)
    return other


def _goals(sparsity: Sequence[float], speedup: Sequence[float]) -> dict[str, dict[str, Any]]:
    """What is asked for, by its name in rows: half and three quarters, if nothing is named."""
    fractions = sparsity or ((0.5, 0.75) if not speedup else ())
    goals: dict[str, dict[str, Any]] = {
        f"{fraction:g}": {"sparsity": fraction, "of": "layers"} for fraction in fractions
    }
    return goals | {
        f"{times:g}x": {"target": Target(speedup=times, batch_size=BATCH)} for times in speedup
    }


def _prune(method: str, goal: dict[str, Any], length: int) -> Prune:
    common: dict[str, Any] = {**goal, "sequence_length": length}
    if method == "one_shot":
        return Prune(**common)
    if method == "calibrated":
        schedule = Schedule(every=30, end=0.6)
        return Prune(**common, schedule=schedule, calibration_samples=256, round_to=16)
    learned = method.startswith("l0")
    common["masks"] = "l0" if learned else {"gradual": "scored", "movement": "movement"}[method]
    if method == "l0_coarse":
        common |= {"coarse": ("layers", "blocks"), "min_heads": 0, "min_neurons": 0}
    if method == "l0_hidden":
        common |= {"coarse": ("hidden",), "round_to": 8}
    schedule = Schedule(every=1 if learned else 5, end=0.6)
    rate = 0.3 if learned else 0.1
    return Prune(
        **common,
        criterion="taylor",
        solver="global",
        schedule=schedule,
        mask_learning_rate=rate,
    )


def _recovery(job: Job, epochs: float, *, taught: bool) -> Train:
    fields: dict[str, Any] = {"num_train_epochs": epochs, "learning_rate": 1e-4}
    return Distill(**fields, temperature=2.0, alpha=0.5) if taught else Train(**fields)


def _figures(job: Job, rows: Rows, name: str) -> None:
    """Measure the model of a job beside the dense one, and write the row."""
    assert job.dense is not None  # noqa: S101  # set when it was fine-tuned
    length = job.arguments.max_length
    models = {"dense": job.dense, "this": job.model}
    times = compare_latency(models, batch_size=BATCH, sequence_length=length, rounds=5)
    counts, before = measure_stage(job.model, length), measure_stage(job.dense, length)
    found = job.score(job.model)
    dense = rows.data["rows"].get(f"{name.split()[0]} dense", {"accuracy": found})["accuracy"]
    row = {
        "accuracy": found,
        "kept_of_dense": found / dense,
        "encoder_removed": 1 - counts["encoder_parameters"] / before["encoder_parameters"],
        "parameters": counts["parameters"],
        "macs": counts["macs"],
        "latency_ms": times["this"].median_ms,
        "speedup": 1 / times["this"].ratio,
        "train_examples": len(job.data["train"]),
        "test_examples": len(job.data["test"]),
    }
    rows.add(name, row)


def _method(job: Job, method: str, goal: dict[str, Any], epochs: float, *, taught: bool) -> Job:
    run = variant(job)
    stage = _prune(method, goal, job.arguments.max_length)
    recovery = _recovery(run, epochs, taught=taught)
    if method == "one_shot":
        run.prune(stage)
        run.train(recovery, (), 1)
    else:
        run.train(recovery, (stage,), 1)
    return run


def _student(job: Job, init: str, teaching: str, epochs: float, logits: Path) -> Job:
    run = variant(job)
    run.report["stages"] = {}
    run.make_student(Student(**SIZES, init=init))  # type: ignore[arg-type]  # checked when it is made
    stages = TEACHINGS[teaching]
    for index, fields in enumerate(stages, 1):
        common: dict[str, Any] = {"num_train_epochs": epochs / len(stages), "learning_rate": 5e-4}
        stage = Distill(**common, **fields) if fields else Train(**common)
        if isinstance(stage, Distill) and not stage.inner:
            stage = stage.model_copy(update={"teacher_logits": str(logits)})
        run.train(stage, (), index)
    return run


_options = (
    click.argument("out", type=click.Path(path_type=Path, dir_okay=False)),
    click.option("--model", default=None, help="A fine-tuned classifier; default: made anew."),
    click.option("--data", type=click.Choice(sorted(TOKENS)), default="rotten-tomatoes"),
    click.option("--samples", default=2000, show_default=True, help="Examples to learn from."),
    click.option("--epochs", default=1.0, show_default=True, help="Of every recovery."),
    click.option("--test-samples", default=0, show_default=True, help="To measure on; 0 = all."),
    click.option("--seed", default=0, show_default=True, help="Of everything random."),
)


def with_options(function: Any) -> Any:
    """Add the options of `start`, and how long every recovery takes."""
    for option in reversed(_options):
        function = option(function)
    return function


def start(
    out: Path, model: str | None, data: str, samples: int, test_samples: int, seed: int
) -> tuple[Rows, Job, str]:
    """The rows so far, the dense job, and what names of rows begin with."""
    torch.set_num_threads(1)
    rows, job = Rows(out), _fine_tuned(model, data, samples, test_samples, seed)
    title = f"{data}:{seed}"
    if f"{title} dense" not in rows:
        _figures(variant(job), rows, f"{title} dense")
    return rows, job, title


@click.command(help=__doc__)
@with_options
@click.option("--sparsity", multiple=True, type=float, help="Of the layers; default 0.5, 0.75.")
@click.option("--speedup", multiple=True, type=float, help="Instead: measured on this machine.")
@click.option(
    "--method", multiple=True, type=click.Choice(METHODS), default=METHODS, show_default=True
)
def methods(
    out: Path,
    epochs: float,
    sparsity: Sequence[float],
    speedup: Sequence[float],
    method: Sequence[str],
    **how: Any,
) -> None:
    """One-shot, gradual, movement and L0, each with and without a teacher."""
    rows, job, title = start(out, **how)
    for wanted, goal in _goals(sparsity, speedup).items():
        for name in method:
            for taught in (True, False):
                key = f"{title} {name} {wanted}{' taught' if taught else ''}"
                if key not in rows:
                    _figures(_method(job, name, goal, epochs, taught=taught), rows, key)


@click.command(help=__doc__)
@with_options
@click.option("--student", multiple=True, type=click.Choice(NAMES), default=NAMES)
def students(out: Path, epochs: float, seed: int, student: Sequence[str], **how: Any) -> None:
    """A TinyBERT-style student by its start, and without a teacher; equal steps."""
    rows, job, title = start(out, seed=seed, **how)
    assert job.dense is not None  # noqa: S101  # set when it was fine-tuned
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.safetensors"  # the teacher need not run for each student
        cache_logits(job.dense, job.batches(job.data["train"], BATCH, "Caching logits"), logits)
        for init, teaching in STUDENTS:
            key = f"{title} student from {init}{teaching}"
            if f"{init}{teaching}" in student and key not in rows:
                torch.manual_seed(seed)
                _figures(_student(job, init, teaching, epochs, logits), rows, key)

"""Heads and neurons in one shot on real models: every criterion and solver in one table.

Rows are kept as they come, so that an interrupted run goes on where it was.
"""

import copy
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from bench_models import (
    Batches,
    accuracy,
    language_case,
    language_options,
    padded,
    perplexity,
    row_name,
    text_case,
    text_options,
)
from bench_rows import LIGHT, Rows, peak_bytes
from packaged import rotten_tomatoes
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_prune.measure.counts import count_encoder_parameters, count_parameters
from hf_prune.measure.latency import compare_latency
from hf_prune.oneshot import Analysis, analyse, prune_once
from hf_prune.recipe import RIDGE, Prune, load_recipe
from hf_prune.statistics.example import example_batch
from hf_prune.surgery.dense import DenseTargets
from hf_prune.targets import Shares
from hf_prune.training.polish import with_judges

AS_IT_IS = ", no re-fit"
"""Ends the names of methods after which nothing is re-fitted, as they were published."""
SEARCHED = ", searched"
"""Ends the names of methods whose widths a search on what the pruned network does refines."""
TRIALS = 24
"""Of such a search."""
POLISHED = ", polished"
"""Ends the names of methods after which norms and biases alone are trained, without labels."""
STEPS = 200
"""Of such a polish, one batch of 32 a step."""
METHODS: dict[str, tuple[str, str]] = {
    "kfac_obs knapsack": ("kfac_obs", "knapsack"),
    "kfac_obs global": ("kfac_obs", "global"),
    "kfac_obs uniform": ("kfac_obs", "uniform"),
    "kfac_obs top_down": ("kfac_obs", "top_down"),
    "kfac_obs template": ("kfac_obs", "template"),
    "kfac_obs_label knapsack": ("kfac_obs_label", "knapsack"),
    "kfac_obs_sampled knapsack": ("kfac_obs_sampled", "knapsack"),
    "obs knapsack": ("obs", "knapsack"),
    "fisher knapsack": ("fisher", "knapsack"),
    "block_fisher knapsack": ("block_fisher", "knapsack"),
    "block_fisher mask_search": ("block_fisher", "mask_search"),
    "fisher_label knapsack": ("fisher_label", "knapsack"),
    "taylor knapsack": ("taylor", "knapsack"),
    "taylor uniform": ("taylor", "uniform"),
    "taylor_batch uniform": ("taylor_batch", "uniform"),
    "structural_sensitivity uniform": ("structural_sensitivity", "uniform"),
    "gradient_norm uniform": ("gradient_norm", "uniform"),
    "obd uniform": ("obd", "uniform"),
    "lamp global": ("lamp", "global"),
    "magnitude_l2 uniform": ("magnitude_l2", "uniform"),
    "magnitude_normalized uniform": ("magnitude_normalized", "uniform"),
    "random_by_weight uniform": ("random_by_weight", "uniform"),
    "activation_norm uniform": ("activation_norm", "uniform"),
    "magnitude uniform": ("magnitude", "uniform"),
    "random uniform": ("random", "uniform"),
}
METHODS |= {
    f"{name}{AS_IT_IS}": METHODS[name]
    for name in (
        "taylor knapsack",
        "activation_norm uniform",
        "magnitude uniform",
        "random uniform",
    )
}
METHODS |= {f"kfac_obs knapsack{how}": ("kfac_obs", "knapsack") for how in (SEARCHED, POLISHED)}
"""What is compared, best first, so that an interrupted run has the most telling rows."""
TEMPLATE = {"pattern": "uniform_width", "multiple": 64}
"""Of the rows with a template: the same share of every site."""
LEVELS: dict[str, dict[str, Any]] = {
    "0.5 of the encoder": {"sparsity": 0.5, "of": "layers"},
    "0.7 of the encoder": {"sparsity": 0.7, "of": "layers"},
    "0.9 of the encoder": {"sparsity": 0.9, "of": "layers"},
    "1.5x": {"target": {"speedup": "1.5x", "batch_size": 32}},
    "2x": {"target": {"speedup": "2x", "batch_size": 32}},
    "3x": {"target": {"speedup": "3x", "batch_size": 32}},
    "4x": {"target": {"speedup": "4x", "batch_size": 32}},
}
"""How much goes. A speed-up is that of the whole model, 32 sequences of 64 tokens."""
GROWTH: dict[str, dict[str, int]] = {
    "3 layers": {"num_hidden_layers": 3},
    "12 layers": {"num_hidden_layers": 12},
    "width 192": {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6},
    "width 768": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 24},
}
"""Sizes beside those of MiniLM-L6: 6 layers, width 384, 12 heads, 1,536 neurons."""
TOKENS = 64
"""Tokens of a sequence when time is measured."""


def prune_stage(method: str, goal: dict[str, Any], **options: Any) -> Prune:
    """The stage of a method and a goal, checked as a recipe is."""
    light, method = method.endswith(LIGHT), method.removesuffix(LIGHT)
    criterion, solver = METHODS[method]
    data = {
        "stage": "prune",
        "criterion": criterion,
        "solver": solver,
        "round_to": 16,
        "min_neurons": 16,
        **({"template": TEMPLATE} if solver == "template" else {}),
        "sequence_length": TOKENS,
        "reconstruct": not method.endswith(AS_IT_IS),
        "search_trials": TRIALS if method.endswith(SEARCHED) else 0,
        "polish_steps": STEPS if method.endswith(POLISHED) else 0,
        **({"ridge": RIDGE} if light else {}),
        **goal,
        **options,
    }
    return load_recipe({"stages": [data]}).prune_stages[0]


def _missing(
    model: PreTrainedModel,
    calibration: Batches,
    seed: int,
    rows: Rows,
    wanted: Mapping[str, Mapping[str, str]],
) -> Iterator[tuple[str, str, str, Analysis]]:
    """The key, method and level of each row that is not there yet, and what to decide it from.

    `wanted` holds the levels of keys by method. Methods of one criterion share an analysis, and
    all of them one dense pass, but for those that hold examples out to judge a polish. What was
    timed of some widths serves all.
    """
    samples = sum(len(batch["input_ids"]) for batch in calibration)
    made: dict[tuple[str, int], Analysis] = {}
    targets: dict[int, DenseTargets] = {}
    shares: Shares = {}
    for method, levels in wanted.items():
        stage = prune_stage(method, {"sparsity": 0.5}, calibration_samples=samples)
        steps = stage.polish_steps
        for key, level in levels.items():
            if key in rows:
                continue
            if (stage.criterion, steps) not in made:
                fitted, judges = with_judges(model, calibration) if steps else (calibration, ())
                found = analyse(model, stage, fitted, seed, judges=judges)
                made[stage.criterion, steps] = found
            analysis = made[stage.criterion, steps]
            analysis.targets = targets.get(steps) or analysis.dense_targets()
            targets[steps] = analysis.targets
            analysis.shares = shares
            yield key, method, level, analysis


def _text_row(analysis: Analysis, stage: Prune, test: Batches, dense: float) -> dict[str, Any]:
    cpu = time.process_time()
    pruned = prune_once(analysis, stage)
    cpu = time.process_time() - cpu
    value = accuracy(pruned.model, test)
    removed = 1 - count_encoder_parameters(pruned.model) / count_encoder_parameters(analysis.model)
    row = {
        "accuracy": value,
        "kept_of_dense": value / dense,
        "encoder_removed": removed,
        "cpu_seconds": cpu,
        "seconds": pruned.entry["seconds"],
    }
    if pruned.decision.timing is not None:
        row["timing"] = pruned.decision.timing.to_dict()
    return row


@click.command()
@text_options
@click.option("--methods", default=";".join(METHODS), help="Some of the methods.")
@click.option("--levels", default=";".join(LEVELS), help="Some of the levels.")
def text(out: Path, methods: str, levels: str, **about: Any) -> None:
    """Accuracy of a fine-tuned classifier, nothing trained after removal."""
    case, seed = text_case(out, **about), about["seed"]
    wanted = {
        method: {row_name(level, method, about): level for level in levels.split(";")}
        for method in methods.split(";")
    }
    for key, method, level, analysis in _missing(
        case.model, case.calibration, seed, case.rows, wanted
    ):
        stage = prune_stage(method, LEVELS[level])
        case.rows.add(key, _text_row(analysis, stage, case.test, case.dense))


@click.command()
@language_options
@click.option("--methods", default=";".join(METHODS), help="Some of the methods.")
@click.option("--levels", default="0.125,0.25,0.375", show_default=True, help="Sparsities.")
def language_model(out: Path, methods: str, levels: str, **about: Any) -> None:
    """Perplexity of a causal language model on WikiText-2, calibrated on its valid split."""
    case = language_case(out, **about)
    wanted = {
        method: {f"{level} {method}": level for level in levels.split(",")}
        for method in methods.split(";")
    }
    for key, method, level, analysis in _missing(
        case.model(), case.calibration, 0, case.rows, wanted
    ):
        pruned = prune_once(analysis, prune_stage(method, {"sparsity": float(level)}))
        row = {
            "perplexity": perplexity(pruned.model, case.test),
            "parameters": count_parameters(pruned.model),
            "seconds": pruned.entry["seconds"],
            "peak_bytes": peak_bytes(),
        }
        case.rows.add(key, row)


def _classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    """A fine-tuned classifier, its tokenizer, and its shuffled training texts."""
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    train = rotten_tomatoes()["train"].shuffle(seed=0)
    return model, AutoTokenizer.from_pretrained(folder), train


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
def cost(out: Path, folder: Path) -> None:
    """Seconds of each stage, by samples, layers and width; a family of targets beside one."""
    rows, (model, tokenizer, train) = Rows(out), _classifier(folder)
    method = "kfac_obs knapsack"
    for samples in (128, 256, 512, 1024):
        batches = padded(tokenizer, train.select(range(samples)), 128, 32)
        row = _cost(model, method, batches)
        rows.add(f"{samples} samples", {**row, "peak_bytes": peak_bytes()})
    few = padded(tokenizer, train.select(range(128)), 128, 32)
    for name, sizes in GROWTH.items():
        rows.add(f"128 samples, {name}", _cost(_of_size(model, sizes), method, few))
    batches = padded(tokenizer, train.select(range(512)), 128, 32)
    goals = [{"sparsity": value, "of": "layers"} for value in (0.5, 0.67, 0.8, 0.9)]
    for name, wanted in (("one target", goals[:1]), ("family of four", goals)):
        stages = [prune_stage(method, goal) for goal in wanted]
        start = time.process_time()
        analysis = analyse(model, stages[0], batches, 0)
        for stage in stages:
            prune_once(analysis, stage)
        rows.add(name, {"cpu_seconds": time.process_time() - start})
    rows.add("training step", {"seconds_of_5000_samples": _epoch_seconds(model)})


def _cost(model: PreTrainedModel, method: str, batches: Batches) -> dict[str, Any]:
    """CPU seconds of halving a model, and wall seconds of each step."""
    stage = prune_stage(method, {"sparsity": 0.5, "of": "layers"}, calibration_samples=1024)
    start = time.process_time()
    seconds = prune_once(analyse(model, stage, batches, 0), stage).entry["seconds"]
    return {"cpu_seconds": time.process_time() - start, "seconds": seconds}


def _of_size(model: PreTrainedModel, sizes: dict[str, int]) -> PreTrainedModel:
    """A model of other sizes, its weights random: for times alone."""
    config = copy.deepcopy(model.config)
    for name, value in sizes.items():
        setattr(config, name, value)
    made: PreTrainedModel = type(model)(config).eval()
    return made


def _epoch_seconds(model: PreTrainedModel, steps: int = 6) -> float:
    """Time of training on 5,000 examples of 32 tokens, from the median of a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = {**example_batch(model, 32, 32), "labels": torch.arange(32) % 2}
    model.train()
    times = []
    for _ in range(steps):
        start = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    return statistics.median(times) * math.ceil(5000 / 32)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
def latency(out: Path, folder: Path) -> None:
    """Latency asked for against latency measured afterwards, at batch 1 and 32."""
    rows, (model, tokenizer, train) = Rows(out), _classifier(folder)
    calibration = padded(tokenizer, train.select(range(128)), 128, 32)
    options = {"reconstruct": False, "calibration_samples": 128}
    stage = prune_stage("kfac_obs knapsack", {"sparsity": 0.5}, **options)
    analysis = analyse(model, stage, calibration, 0)
    for batch_size in (1, 32):
        for speedup in (1.5, 2.0, 3.0, 4.0):
            target = {"speedup": speedup, "batch_size": batch_size}
            stage = prune_stage("kfac_obs knapsack", {"target": target}, **options)
            pruned = prune_once(analysis, stage)
            again = compare_latency(
                {"dense": model, "pruned": pruned.model},
                batch_size=batch_size,
                sequence_length=TOKENS,
                rounds=25,
            )["pruned"]
            assert pruned.decision.timing is not None  # noqa: S101  # the target is one of time
            row = {
                **pruned.decision.timing.to_dict(),
                "speedup_measured_again": 1 / again.ratio,
                "deviation_measured_again": again.ratio * speedup - 1,
                "encoder_removed": 1
                - count_encoder_parameters(pruned.model) / count_encoder_parameters(model),
            }
            rows.add(f"{speedup}x batch {batch_size}", row)

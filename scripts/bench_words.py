"""WNUT-17, entities in noisy text: F1 of the dense model, at twice its speed, and recovered.

The packaged MiniLM-L6 is fine-tuned, pruned to the speed-up that is measured on this machine, and
taught by the dense model: the stages that scripts/prune_bert.py carries out.
"""

from pathlib import Path
from typing import Any

import click
import torch
from arguments import Arguments
from bench_rows import Rows
from job import Job
from packaged import packaged_model

from hf_prune import Recipe
from hf_prune.recipe import Distill, Prune, Target, Train

TOKENS, BATCH = 32, 32
"""Of the input whose time is asked for and measured."""


def _recipe(seed: int, speedup: float, epochs: float, recovery: float) -> Recipe:
    learn: dict[str, Any] = {"learning_rate": 1e-4, "per_device_train_batch_size": 32}
    return Recipe(
        seed=seed,
        stages=(
            Train(num_train_epochs=epochs, warmup_steps=20, **learn),
            Prune(
                target=Target(speedup=speedup, batch_size=BATCH),
                sequence_length=TOKENS,
                round_to=16,
            ),
            Distill(num_train_epochs=recovery, **learn),
        ),
    )


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--epochs", default=2.0, show_default=True, help="Of fine-tuning.")
@click.option("--recovery", default=1.0, show_default=True, help="Epochs after pruning.")
@click.option("--speedup", default=2.0, show_default=True, help="That is asked for.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
def command(
    out: Path, data: Path, epochs: float, recovery: float, speedup: float, seed: int
) -> None:
    """Entity F1 on WNUT-17, dense and at a measured speed-up, written to OUT."""
    torch.set_num_threads(1)
    arguments = Arguments(
        task="token-classification",
        train_file=str(data / "wnut17train.conll"),
        eval_file=str(data / "emerging.test.annotated"),
        max_train_samples=0,
        max_length=64,
        latency_batch_size=BATCH,
        latency_tokens=TOKENS,
        latency_rounds=9,
    )
    job = Job(arguments, _recipe(seed, speedup, epochs, recovery), packaged_model())
    report = job.run().report
    rows, stages, latency = Rows(out), report["stages"], report["latency"]
    dense, size = stages["dense"], f"batch_{BATCH}"
    for name, stage in stages.items():
        row = {
            "f1": stage["f1"],
            "accuracy": stage["accuracy"],
            "kept_of_dense": stage["f1"] / dense["f1"],
            "encoder_removed": 1 - stage["encoder_parameters"] / dense["encoder_parameters"],
            "parameters": stage["parameters"],
            "speedup": 1 / latency[name][size]["ratio"],
            "epochs": epochs,
            "recovery_epochs": recovery,
            "train_examples": len(job.data["train"]),
            "test_examples": report["evaluation"]["examples"],
        }
        rows.add(f"wnut17:{seed} {speedup:g}x {name}", row)

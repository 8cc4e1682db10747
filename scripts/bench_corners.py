"""Pruning and quantization together: dense, pruned, in int8, and both, in accuracy and time."""

from pathlib import Path

import click
import torch
from bench_models import TextCase, accuracy, text_case, text_options
from bench_structured import TOKENS, prune_stage
from transformers import PreTrainedModel

from hf_prune.export import onnx_int8
from hf_prune.measure.corners import four_corners, quantize_int8
from hf_prune.oneshot import analyse, prune_once

QUANTIZERS = {"torchao": quantize_int8, "onnxruntime": onnx_int8}
REMOVED = (0.5, 0.75)
"""Of the encoder."""


def _add(case: TextCase, title: str, pruned: PreTrainedModel) -> None:
    for name, quantize in QUANTIZERS.items():
        for batch_size, rounds in ((1, 60), (32, 9)):
            key = f"{title}, {name}, batch {batch_size}"
            if f"{key}: both" in case.rows:
                continue
            torch.manual_seed(0)
            corners = four_corners(
                case.model,
                pruned,
                lambda model: accuracy(model, case.test),
                batch_size=batch_size,
                sequence_length=TOKENS,
                rounds=rounds,
                quantize=quantize,
            )
            for corner, found in corners.items():
                value = found.pop("metric")
                row = {"accuracy": value, "kept_of_dense": value / case.dense, **found}
                case.rows.add(f"{key}: {corner}", {**row, "speedup": 1 / row["ratio"]})


@click.command(help=__doc__)
@text_options
def command(out: Path, **about: object) -> None:
    """Half and three quarters of the encoder gone in one shot, then int8."""
    case, seed = text_case(out, **about), about["seed"]  # type: ignore[arg-type]  # click's options
    assert isinstance(seed, int)  # noqa: S101  # the same
    stages = [
        prune_stage("kfac_obs knapsack", {"sparsity": share, "of": "layers"}) for share in REMOVED
    ]
    analysis = analyse(case.model, stages[0], case.calibration, seed)
    for share, stage in zip(REMOVED, stages, strict=True):
        pruned = prune_once(analysis, stage).model
        _add(case, f"{about['data']} {share:g} of the encoder gone", pruned)

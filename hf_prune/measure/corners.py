"""The four corners of pruning and quantization: dense, pruned, quantized, both, in one report."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.measure.counts import count_nonzero, count_parameters
from hf_prune.measure.latency import compare_latency

CORNERS = ("dense", "pruned", "quantized", "both")
"""In this order; ratios of latency are to the first."""


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers have int8 weights, and int8 activations scaled as they come.

    Raises:
        ConfigError: when torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise ConfigError("int8 needs torchao. Run: pip install torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copied = copy.deepcopy(model)
    quantize_(copied, Int8DynamicActivationInt8WeightConfig())
    return copied


def four_corners(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    metric: Callable[[PreTrainedModel], float],
    *,
    batch_size: int = 32,
    sequence_length: int = 64,
    rounds: int = 15,
    quantize: Callable[[PreTrainedModel], Any] = quantize_int8,
) -> dict[str, dict[str, Any]]:
    """Metric and latency of a model dense, pruned, in int8, and both; all in one run.

    Args:
        dense: the model before pruning.
        pruned: the same after it.
        metric: from a model to a number, such as its accuracy.
        batch_size: sequences at once when time is measured.
        sequence_length: tokens of each.
        rounds: measured rounds, the four models in turn.
        quantize: from a model to one that is called like it: torchao's int8 here, or
            `hf_prune.export.onnx_int8`.

    Returns:
        For each corner `metric`, `median_ms` with quartiles, `ratio` of that to the dense model as
        measured, and for the two that are not quantized the counts of parameters and of those that
        are not zero. What is slower in int8 on this machine is said to be slower.

    Raises:
        ConfigError: when what `quantize` needs is not installed.
    """
    made = (dense, pruned, quantize(dense), quantize(pruned))
    models = dict(zip(CORNERS, made, strict=True))
    times = compare_latency(
        models, batch_size=batch_size, sequence_length=sequence_length, rounds=rounds
    )
    report: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        report[name] = {"metric": metric(model), **times[name].to_dict()}
    for name in CORNERS[:2]:
        report[name]["parameters"] = count_parameters(models[name])
        report[name]["nonzero_parameters"] = count_nonzero(models[name])
    return report

"""Latency: measured, never derived; models in turn, so that a busy machine is fair to all."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_prune.statistics.example import example_batch


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median and quartiles over rounds.

    `ratio` is the median over rounds of this model's time over the first model's in the same round.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float

    def to_dict(self) -> dict[str, float]:
        """For the report."""
        return {
            "median_ms": self.median_ms,
            "quartile_1_ms": self.low_ms,
            "quartile_3_ms": self.high_ms,
            "ratio": self.ratio,
        }


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; on a CPU nothing waits."""
    if device.type in ("cuda", "xpu", "mps"):
        torch.accelerator.synchronize()


def _time_ms(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    model(**batch)
    synchronize(model.device)
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def compare_latency(
    models: Mapping[str, PreTrainedModel],
    *,
    batch_size: int,
    sequence_length: int = 64,
    rounds: int = 15,
    warmup: int = 3,
    progress: str | None = None,
) -> dict[str, Latency]:
    """The latency of several models, measured in turn, round by round.

    Args:
        models: by name; ratios are to the first.
        batch_size: sequences at once.
        sequence_length: tokens of each, none of them padding.
        rounds: measured rounds.
        warmup: rounds before them.
        progress: title of a progress bar; none without it.
    """
    modes = {name: model.training for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        for model in models.values():
            model.eval()
        batches = {n: example_batch(m, batch_size, sequence_length) for n, m in models.items()}
        for turn in tqdm(range(warmup + rounds), desc=progress, disable=progress is None):
            for name, model in models.items():
                elapsed = _time_ms(model, batches[name])
                if turn >= warmup:
                    times[name].append(elapsed)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    first = times[next(iter(models))]
    return {name: _summary(values, first) for name, values in times.items()}


def _summary(values: list[float], first: list[float]) -> Latency:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
    return Latency(median, low, high, ratio)

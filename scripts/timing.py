"""Latency of what a script has made, beside the model that it began with."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from arguments import Arguments
from transformers import PreTrainedModel

from hf_prune.measure.latency import compare_latency
from hf_prune.statistics.processes import of_the_main_process


def time_stages(
    models: Mapping[str, PreTrainedModel], arguments: Arguments, stages: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Time models in turn, on the main process while the others wait.

    Args:
        models: by stage, the dense one first.
        arguments: sequences at once, their tokens, and rounds; a single sequence is timed, too.
        stages: of the report; the medians are added to them.

    Returns:
        How it was timed, and all figures by stage and batch size.
    """
    size, tokens, rounds = (
        arguments.latency_batch_size,
        arguments.latency_tokens,
        arguments.latency_rounds,
    )
    latency: dict[str, Any] = {"batch_size": size, "sequence_length": tokens, "rounds": rounds}
    for batch, key in ((size, "latency_ms"), (1, "latency_ms_batch_1")):
        measure = partial(
            compare_latency,
            models,
            batch_size=batch,
            sequence_length=tokens,
            rounds=rounds * (1 if batch > 1 else 4),
        )
        for name, item in of_the_main_process(measure).items():
            stages[name][key] = item.median_ms
            latency.setdefault(name, {})[f"batch_{batch}"] = item.to_dict()
    return latency

"""Where the walks through stacks of layers begin: of the dense network, and of the pruned one."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from hf_prune.statistics.streams import Stream, start_streams
from hf_prune.weights.walk import Inputs, Real, real_tokens


def all_starts(
    model: nn.Module, batches: Sequence[Inputs], stacks: Sequence[list[str]]
) -> dict[str, list[Stream]]:
    """What enters each stack of layers, by its first layer, as long as nothing was pruned."""
    if not isinstance(model, PreTrainedModel):
        return {}
    return {stack[0]: _streams(model, batches, stack) for stack in stacks}


def _streams(
    model: PreTrainedModel, batches: Sequence[Inputs], layers: Sequence[str]
) -> list[Stream]:
    return start_streams(model, model, batches, layers)  # type: ignore[arg-type]  # transformers take mappings


def start_again_(
    model: PreTrainedModel,
    streams: Sequence[Stream],
    batches: Sequence[Inputs],
    layers: Sequence[str],
) -> None:
    """Let the pruned streams begin with what the pruned network makes of the batches by now."""
    others = _streams(model, batches, layers)
    for stream, other in zip(streams, others, strict=True):
        stream.pruned, stream.pruned_calls = other.pruned, other.calls


def tokens_of_both(model: nn.Module, batches: Sequence[Inputs]) -> Sequence[Real]:
    """Which tokens of encoder and decoder are real; nothing where there are not both."""
    both = isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder
    return real_tokens(model, batches) if both else ()

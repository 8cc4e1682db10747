"""Channels of any module that single zeros have left without effect: found, and really removed.

For modules that nobody has described, such as a plain CNN. What is not certain, as across a sum of
two branches, stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, DataError, UnsupportedModelError
from hf_prune.recipe import did_you_mean
from hf_prune.surgery.flows import Flow, Layer, Way, find_flows

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Channels:
    """What `remove_dead_channels_` has left.

    `kept` holds, for each layer that lost some, the sorted indices of its output channels that
    stay: `keep_channels_` takes it. `masks` are those of single weights, in the new shapes.
    """

    kept: dict[str, tuple[int, ...]]
    masks: dict[str, Tensor]


def _columns(layer: Layer, way: Way) -> Tensor:
    """What a layer multiplies each channel with, for each output, `[C, O, N]`."""
    weight = layer.weight.detach().flatten(2) if layer.weight.ndim > 2 else layer.weight.detach()
    columns: Tensor = weight.unflatten(1, (way.value.shape[1], -1)).flatten(2)  # [O, C, N]
    return columns.transpose(0, 1)


def _folds(layer: Layer, way: Way) -> Tensor:
    """Constant channels that a reader can take into its bias, `[C]`: it has one, and no border."""
    value = way.value.flatten()
    if layer.bias is None:
        return torch.zeros_like(value, dtype=torch.bool)
    if not isinstance(layer, nn.Linear) and layer.padding_mode == "zeros":
        return value.isfinite() & (not any(layer._reversed_padding_repeated_twice))
    return value.isfinite()


def _dead(root: nn.Module, flow: Flow) -> Tensor:
    """Channels without an effect that is not constant, `[C]`; one always stays."""
    layer: Any = root.get_submodule(flow.layer)
    unread = torch.ones(layer.weight.shape[0], dtype=torch.bool, device=layer.weight.device)
    moves = unread.clone()
    for name, way in flow.readers.items():
        reader: Any = root.get_submodule(name)
        unread &= (_columns(reader, way) == 0).flatten(1).all(dim=1)
        moves &= (way.value.flatten() == 0) | _folds(reader, way)
    constant = (layer.weight.detach() == 0).flatten(1).all(dim=1)
    dead: Tensor = unread | (constant & moves)
    if dead.all():
        dead[0] = False
    return dead


def _fold_(root: nn.Module, flow: Flow, dead: Tensor) -> None:
    """Add what dead channels give to the biases of their readers."""
    layer: Any = root.get_submodule(flow.layer)
    constant = (layer.weight == 0).flatten(1).all(dim=1) & dead
    for name, way in flow.readers.items():
        reader: Any = root.get_submodule(name)
        values = way.value.flatten().where(constant & _folds(reader, way), 0)  # [C]
        if values.any():
            reader.bias += torch.einsum("con,c->o", _columns(reader, way), values)


def _narrow_(
    root: nn.Module, name: str, index: Tensor, axis: int, masks: dict[str, Tensor]
) -> None:
    """Leave only some entries of the parameters and masks of a module, along one axis."""
    module = root.get_submodule(name)
    for key, parameter in list(module._parameters.items()):
        if parameter is None or axis >= parameter.ndim:
            continue
        small = parameter.detach().index_select(axis, index)
        module._parameters[key] = nn.Parameter(small, parameter.requires_grad)
        place = f"{name}.{key}"
        if place in masks:
            masks[place] = masks[place].index_select(axis, index.to(masks[place].device))
    for key, value in list(module._buffers.items()):
        if value is not None and axis == 0 and value.ndim == 1:
            module._buffers[key] = value.index_select(0, index)
    sizes = ("out_features", "out_channels", "num_features"), ("in_features", "in_channels")
    for size in sizes[axis]:
        if hasattr(module, size):
            setattr(module, size, len(index))


def _keep_(root: nn.Module, flow: Flow, kept: Sequence[int], masks: dict[str, Tensor]) -> None:
    """Narrow a layer, the norms behind it, and all that read it."""
    device = next(root.get_submodule(flow.layer).parameters()).device
    index = torch.tensor(kept, device=device)  # [kept]
    for name in (flow.layer, *flow.norms):
        _narrow_(root, name, index, 0, masks)
    for name, way in flow.readers.items():
        span = torch.arange(way.span, device=device)
        _narrow_(root, name, (index[:, None] * way.span + span).flatten(), 1, masks)


def _arguments(module: nn.Module, batch: Any) -> tuple[Any, ...]:
    """What `forward` is called with.

    Raises:
        DataError: for anything but a tensor or a tuple of arguments.
        UnsupportedModelError: for a model of transformers.
    """
    if isinstance(module, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(module).__name__} is a model of transformers: `compress` removes its dead "
            "units by itself, and writes them into its config."
        )
    if not isinstance(batch, Tensor | tuple):
        raise DataError(
            f"a batch is a tensor or a tuple of arguments, and not a {type(batch).__name__}."
        )
    return batch if isinstance(batch, tuple) else (batch,)


@torch.no_grad()
def remove_dead_channels_(module: nn.Module, batch: Any, masks: Masks | None = None) -> Channels:
    """Really remove, in place, channels that zeros have left without effect.

    A channel of a linear layer or a convolution goes when nothing reads it, or when its own weights
    are all zero: what its bias gives moves into the biases of the layers that read it. In eval mode
    the module computes the same as before. Its shapes and parameters are others: make an optimizer
    afterwards, and call `keep_channels_` on a new module before it loads the state. States of
    recurrent layers, sums of branches and what `forward` reads in other ways stay as they are.

    Args:
        module: that `torch.fx` can trace, on one device.
        batch: one input with a batch axis, a tensor or a tuple of arguments; it is run.
        masks: of single weights, by parameter name.

    Raises:
        DataError: for a batch that is something else.
        UnsupportedModelError: for a module that cannot be traced, or a model of transformers.
    """
    arguments = _arguments(module, batch)
    narrowed, kept, again = dict(masks or {}), dict[str, list[int]](), True
    while again:  # what nobody reads any more has read something itself
        again = False
        for flow in list(find_flows(module, arguments)):
            dead = _dead(module, flow)
            if not dead.any():
                continue
            again = True
            _fold_(module, flow, dead)
            stay = (~dead).nonzero().flatten().tolist()
            before = kept.get(flow.layer, range(len(dead)))
            kept[flow.layer] = [before[place] for place in stay]
            _keep_(module, flow, stay, narrowed)
    return Channels({name: tuple(places) for name, places in kept.items()}, narrowed)


def keep_channels_(module: nn.Module, batch: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Leave, in place, only some output channels of some layers, so that a state fits.

    Args:
        module: a new one, as the pruned one was built.
        batch: as for `remove_dead_channels_`.
        kept: what that function returned.

    Raises:
        ConfigError: for a layer or channel that there is not.
        DataError: for a batch that is not a tensor or a tuple.
        UnsupportedModelError: for a module that cannot be traced, or a model of transformers.
    """
    flows = {flow.layer: flow for flow in find_flows(module, _arguments(module, batch))}
    for name, places in kept.items():
        if name not in flows:
            raise ConfigError(
                f"channels of {name!r} cannot be removed{did_you_mean(name, list(flows))}"
            )
        count = len(module.get_submodule(name).weight)  # type: ignore[arg-type]  # of a layer
        rising = all(low < high for low, high in pairwise(places))
        if not places or not rising or not 0 <= places[0] <= places[-1] < count:
            raise ConfigError(
                f"{name}: {list(places)} are not rising indices of its {count} channels."
            )
    for name, places in kept.items():
        _keep_(module, flows[name], places, {})

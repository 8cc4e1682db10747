"""Layers that read channels: which they need, what they take into a bias, how they shrink."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.surgery.flows import NORMS, Flow, Layer, Way
from hf_prune.weights.find import RECURRENT

Masks = Mapping[str, Tensor]
SIZES = (
    ("out_features", "out_channels", "num_features", "hidden_size"),
    ("in_features", "in_channels", "input_size"),
)
"""Attributes that say how many channels a module gives, and reads."""


def inputs_of(layer: nn.Module) -> list[str]:
    """The parameters of a layer whose second axis is that of what it reads."""
    if isinstance(layer, RECURRENT):
        return [key for key in layer._parameters if key.startswith("weight_ih_l0")]
    return ["weight"]


def _columns(layer: nn.Module, way: Way) -> Tensor:
    """What a layer multiplies each channel with, for each output, `[C, O, N]`."""
    weights = [layer.get_parameter(key).detach() for key in inputs_of(layer)]
    weight = torch.cat([w.flatten(2) if w.ndim > 2 else w for w in weights])
    channels = way.value.shape[1]
    size = weight[0].numel() // channels if len(weight) else 0
    columns: Tensor = weight.reshape(len(weight), channels, size)  # [O, C, N]
    return columns.transpose(0, 1)


def _has_border(layer: Layer) -> bool:
    """Whether a convolution sees zeros beyond the border."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _folds(layer: Any, way: Way, mask: Tensor | None) -> Tensor:
    """Constant channels that a reader can take into its bias, `[C]`: it has one, and no border."""
    value = way.value.flatten()
    held = mask is not None and not bool(mask.all())  # some of its biases are to stay zero
    if isinstance(layer, RECURRENT) or layer.bias is None or held or _has_border(layer):
        return torch.zeros_like(value, dtype=torch.bool)
    return value.isfinite()


def is_unread(root: nn.Module, flow: Flow) -> Tensor:
    """Channels that all readers multiply with zeros, `[C]`."""
    every = [
        (_columns(root.get_submodule(name), way) == 0).flatten(1).all(dim=1)
        for name, way in flow.readers.items()
    ]
    return torch.stack(every).all(dim=0)


def can_move(root: nn.Module, flow: Flow, masks: Masks) -> Tensor:
    """Channels that, where constant, give nothing or fit into the readers' biases, `[C]`."""
    every = []
    for name, way in flow.readers.items():
        folds = _folds(root.get_submodule(name), way, masks.get(f"{name}.bias"))
        every.append((way.value.flatten() == 0) | folds)
    return torch.stack(every).all(dim=0)


def fold_(root: nn.Module, flow: Flow, constant: Tensor, masks: Masks) -> None:
    """Add what constant channels, `[C]`, give to the biases of their readers."""
    for name, way in flow.readers.items():
        reader: Any = root.get_submodule(name)
        moves = constant & _folds(reader, way, masks.get(f"{name}.bias"))
        values = way.value.flatten().where(moves, 0)  # [C]
        if values.any():
            more = torch.einsum("con,c->o", _columns(reader, way), values)
            reader.bias = nn.Parameter(reader.bias + more, reader.bias.requires_grad)


def narrow_(
    root: nn.Module, name: str, key: str, axis: int, index: Tensor, masks: dict[str, Tensor]
) -> None:
    """Leave only some entries of a parameter, and of its mask, along one axis."""
    module = root.get_submodule(name)
    parameter = module.get_parameter(key)
    small = parameter.detach().index_select(axis, index)
    setattr(module, key, nn.Parameter(small, parameter.requires_grad))
    place = f"{name}.{key}" if name else key
    if place in masks:
        masks[place] = masks[place].index_select(axis, index.to(masks[place].device))


def narrow_outputs_(root: nn.Module, name: str, index: Tensor, masks: dict[str, Tensor]) -> None:
    """Leave only some channels of what a linear layer, a convolution or a norm gives."""
    module = root.get_submodule(name)
    for key in ("weight", "bias"):
        if module._parameters[key] is not None:
            narrow_(root, name, key, 0, index, masks)
    if isinstance(module, NORMS):
        for key in ("running_mean", "running_var"):
            module._buffers[key] = getattr(module, key).index_select(0, index)
    say_size_(module, 0, len(index))


def say_size_(module: nn.Module, axis: int, size: int) -> None:
    """Make the attributes of a module say how many channels it gives, or reads."""
    for attribute in SIZES[axis]:
        if hasattr(module, attribute):
            setattr(module, attribute, size)


def keep_(root: nn.Module, flow: Flow, kept: Sequence[int], masks: dict[str, Tensor]) -> None:
    """Narrow the norms behind a layer, and all that read it."""
    device = next(root.get_submodule(flow.layer).parameters()).device
    index = torch.tensor(kept, device=device)  # [kept]
    for name in flow.norms:
        narrow_outputs_(root, name, index, masks)
    for name, way in flow.readers.items():
        span = torch.arange(way.span, device=device)
        columns = (index[:, None] * way.span + span).flatten()
        reader = root.get_submodule(name)
        for key in inputs_of(reader):
            narrow_(root, name, key, 1, columns, masks)
        say_size_(reader, 1, len(columns))

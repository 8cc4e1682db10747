"""Channels of any module that single zeros have left without effect: found, and really removed.

For modules that nobody has described, such as a plain CNN. What is not certain, as across a sum of
two branches, stays as it is; and nothing is changed before a copy without these channels was seen
to give the same.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, DataError, UnsupportedModelError
from hf_prune.recipe import did_you_mean
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.flows import NORMS, READERS, Flow, States, find_flows, steps
from hf_prune.surgery.readers import (
    SIZES,
    Masks,
    can_move,
    fold_,
    is_unread,
    keep_,
    narrow_outputs_,
)
from hf_prune.surgery.states import keep_states_, names_of, remove_states_

SAME = 1e-5
"""Outputs may differ by so much of the largest one; copies are compared in double precision."""


@dataclass(frozen=True)
class Channels:
    """What `remove_dead_channels_` has left.

    `kept` holds, for each layer that lost some, the sorted indices of its output channels that
    stay: `keep_channels_` takes it. States of recurrent layers stand under the names of the
    matrices that read them, as `lstm.weight_hh_l0`. `masks` are those of single weights, in the new
    shapes.
    """

    kept: dict[str, tuple[int, ...]]
    masks: dict[str, Tensor]


def _names(root: nn.Module, flow: Flow | States) -> list[str]:
    """Under which names it is said what stays of a layer."""
    return names_of(root, flow) if isinstance(flow, States) else [flow.layer]


def _dead(root: nn.Module, flow: Flow, masks: Masks) -> tuple[Tensor, Tensor]:
    """Channels without an effect that is not constant, and the constant ones of them, `[C]` both.

    One always stays.
    """
    layer: Any = root.get_submodule(flow.layer)
    constant = (layer.weight.detach() == 0).flatten(1).all(dim=1)
    dead = is_unread(root, flow) | (constant & can_move(root, flow, masks))
    if dead.all():
        dead[0] = False
    return dead, constant & dead


def _remove_(root: nn.Module, flow: Flow | States, masks: dict[str, Tensor]) -> list[list[int]]:
    """Remove what is dead of a layer: what stays, by its names; nothing where all does."""
    if isinstance(flow, States):
        return remove_states_(root, flow, masks)
    dead, constant = _dead(root, flow, masks)
    if not dead.any():
        return []
    fold_(root, flow, constant, masks)
    kept = [(~dead).nonzero().flatten().tolist()]
    _keep_(root, flow, kept, masks)
    return kept


def _keep_(
    root: nn.Module,
    flow: Flow | States,
    kept: Sequence[Sequence[int]],
    masks: dict[str, Tensor],
) -> None:
    """Narrow a layer, the norms behind it, and all that read it."""
    if isinstance(flow, States):
        keep_states_(root, flow, kept, masks)
        return
    device = next(root.get_submodule(flow.layer).parameters()).device
    narrow_outputs_(root, flow.layer, torch.tensor(kept[0], device=device), masks)
    keep_(root, flow, kept[0], masks)


def _write_back_(module: nn.Module, narrowed: nn.Module) -> None:
    """Give a module the parameters, statistics and sizes of its narrowed copy, where they differ.

    Of layers and norms alone: what else the copy holds may have changed as it ran.
    """
    for name, other in narrowed.named_modules():
        if type(other) not in (*READERS, *NORMS):
            continue
        own: Any = module.get_submodule(name)
        for key, value in other._parameters.items():
            now = own._parameters[key]
            if value is not None and not (value.shape == now.shape and torch.equal(now, value)):
                setattr(own, key, value)  # recurrent layers hold their weights twice
        for key, held in other._buffers.items():
            if held is not None and held.shape != own._buffers[key].shape:
                own._buffers[key] = held
        for size in (*SIZES[0], *SIZES[1]):
            if size in vars(own):
                setattr(own, size, getattr(other, size))
        if isinstance(own, nn.RNNBase):
            own.flatten_parameters()  # side by side, where an accelerator asks for it


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


def _outputs(module: nn.Module, batch: tuple[Any, ...]) -> list[Any]:
    """All tensors and numbers that come out in eval mode, random ones as with one seed."""
    with in_eval(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tree_leaves(module(*copy.deepcopy(batch)))


def _runs(module: nn.Module, batch: tuple[Any, ...]) -> bool:
    """Whether a copy of a module runs in training mode."""
    copied = copy.deepcopy(module).train()
    with contextlib.suppress(Exception):  # whatever the forward of a stranger raises
        copied(*copy.deepcopy(batch))
        return True
    return False


def _is_same(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return bool(one == two) or not isinstance(one, int | float | str)
    if one.shape != two.shape or not one.is_floating_point():
        return torch.equal(one, two)
    largest = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=SAME * max(largest, SAME), equal_nan=True)


def _double(values: Any) -> Any:
    return tree_map_only(
        Tensor, lambda item: item.double() if item.is_floating_point() else item, values
    )


def _both(
    module: nn.Module, narrowed: nn.Module, batch: tuple[Any, ...]
) -> tuple[list[Any], list[Any]]:
    """What two modules give, in double precision where the first one can: half is too coarse."""
    expected = None
    with contextlib.suppress(Exception):  # whatever the forward of a stranger raises
        expected = _outputs(copy.deepcopy(module).double(), _double(batch))
    if expected is None:
        return _outputs(copy.deepcopy(module), batch), _outputs(copy.deepcopy(narrowed), batch)
    return expected, _outputs(copy.deepcopy(narrowed).double(), _double(batch))


def _check_same(module: nn.Module, narrowed: nn.Module, batch: tuple[Any, ...]) -> None:
    """Refuse to go on where a copy without some channels gives something else.

    Raises:
        UnsupportedModelError: saying so.
    """
    same = False
    with contextlib.suppress(Exception):  # whatever the forward of a stranger raises
        expected, found = _both(module, narrowed, batch)
        same = len(found) == len(expected) and all(map(_is_same, expected, found))
        traced = [steps(copy.deepcopy(part), batch) for part in (module, narrowed)]
        same &= traced[0] == traced[1]
    if not same:
        raise UnsupportedModelError(
            f"without channels that seem to have no effect {type(module).__name__} gives something "
            "else: its forward reads more than the calls of its layers. Nothing was changed."
        )
    if _runs(module, batch) and not _runs(narrowed, batch):
        raise UnsupportedModelError(
            f"{type(module).__name__} computes otherwise in training mode, and could not train "
            "without channels that have no effect in eval mode. Nothing was changed."
        )


def _check_masks(module: nn.Module, masks: Masks) -> None:
    """Refuse masks of what there is not.

    Raises:
        DataError: naming the first one.
    """
    shapes = {name: p.shape for name, p in module.named_parameters(remove_duplicate=False)}
    for name, mask in masks.items():
        if shapes.get(name) != mask.shape:
            raise DataError(f"the mask {name!r} of shape {list(mask.shape)} fits no parameter.")


def _checked_copy(module: nn.Module, batch: tuple[Any, ...]) -> nn.Module:
    """A copy that runs.

    Raises:
        DataError: when it does not.
    """
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"the forward of {type(module).__name__} was replaced: unwrap it first."
        )
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise UnsupportedModelError(
            f"{type(module).__name__} has lazy layers: run it once, so that they have shapes."
        )
    copied = copy.deepcopy(module)
    try:
        _outputs(copied, batch)
    except Exception as error:  # whatever the forward of a stranger raises
        raise DataError(f"{type(module).__name__} does not run on this batch: {error}") from error
    return copied


@torch.no_grad()
def remove_dead_channels_(module: nn.Module, batch: Any, masks: Masks | None = None) -> Channels:
    """Really remove, in place, channels that zeros have left without effect.

    A channel of a linear layer or a convolution goes when nothing reads it, or when its own weights
    are all zero: what its bias gives moves into the biases of the layers that read it. A state of a
    recurrent layer goes when nothing but itself reads it, or when it stays zero; as many go from
    each layer and direction. In eval mode the module computes the same as before: a copy is
    compared on the batch, and nothing is changed otherwise. Its shapes and parameters are others:
    make an optimizer afterwards, and call `keep_channels_` on a new module before it loads the
    state. Sums of branches, layers with hooks, recurrent layers with a first state or a projection,
    and what `forward` reads in other ways stay as they are.

    Args:
        module: that `torch.fx` can trace, on one device.
        batch: one input with a batch axis, a tensor or a tuple of arguments; it is run.
        masks: of single weights, by parameter name.

    Raises:
        DataError: for a batch or masks that do not fit the module.
        UnsupportedModelError: for a module that cannot be traced, or gives something else without
            these channels; or for a model of transformers. Nothing was changed.
    """
    arguments = _arguments(module, batch)
    narrowed, kept, again = dict(masks or {}), dict[str, list[int]](), True
    work = _checked_copy(module, arguments)
    _check_masks(module, narrowed)
    while again:  # what nobody reads any more has read something itself
        again = False
        for flow in find_flows(work, arguments):
            stay = _remove_(work, flow, narrowed)
            again |= bool(stay)
            for name, places in zip(_names(work, flow), stay, strict=False):
                kept[name] = [kept[name][place] for place in places] if name in kept else places
    if kept:
        _check_same(module, work, arguments)
        _write_back_(module, work)
    return Channels({name: tuple(places) for name, places in kept.items()}, narrowed)


def _check_kept(
    root: nn.Module, flow: Flow | States, kept: Mapping[str, Sequence[int]]
) -> list[Sequence[int]]:
    """What stays of a layer, by its names; nothing where nothing is said.

    Raises:
        ConfigError: for what are not rising indices, or not equally many.
    """
    names = _names(root, flow)
    said = {name: kept[name] for name in names if name in kept}
    layer: Any = root.get_submodule(flow.layer)
    count = layer.hidden_size if isinstance(flow, States) else len(layer.weight)
    for name, places in said.items():
        if not _are_rising(places) or places[-1] >= count:
            raise ConfigError(f"{name}: {places} are not rising indices of its {count} channels.")
    if said and (len(said) < len(names) or len({len(places) for places in said.values()}) > 1):
        raise ConfigError(f"equally many states have to stay of each of {', '.join(names)}.")
    return list(said.values())


@torch.no_grad()
def keep_channels_(module: nn.Module, batch: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Leave, in place, only some output channels of some layers, so that a state fits.

    Args:
        module: a new one, as the pruned one was built.
        batch: as for `remove_dead_channels_`.
        kept: what that function returned.

    Raises:
        ConfigError: for a layer or channel that there is not.
        DataError: for a batch that does not fit the module.
        UnsupportedModelError: for a module that cannot be traced, or a model of transformers.
    """
    arguments = _arguments(module, batch)
    work = _checked_copy(module, arguments)
    flows = find_flows(work, arguments)
    certain = [name for flow in flows for name in _names(work, flow)]
    names = [name for name, _ in (*module.named_modules(), *module.named_parameters())]
    for name in kept:
        if name not in names:
            raise ConfigError(f"there is no layer {name!r}{did_you_mean(str(name), certain)}")
        if name not in certain:
            raise ConfigError(f"which layers read the channels of {name!r} is not certain here.")
    wanted = [(flow, _check_kept(work, flow, kept)) for flow in flows]
    for flow, places in wanted:
        if places:
            _keep_(work, flow, places, {})
    _write_back_(module, work)


def _are_rising(places: Any) -> bool:
    """Whether these are indices, at least one, in order."""
    if not isinstance(places, Sequence) or not places:
        return False
    numbers = all(type(place) is int for place in places)
    return numbers and places[0] >= 0 and all(low < high for low, high in pairwise(places))

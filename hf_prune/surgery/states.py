"""States of recurrent layers that single zeros have left without effect: found, and removed.

Layers and directions of one module have equally many states, so that as many go from each of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_prune.surgery.flows import Flow, States
from hf_prune.surgery.readers import (
    Masks,
    can_move,
    fold_,
    is_unread,
    keep_,
    narrow_,
    say_size_,
)

NEW = {"LSTM": 2, "GRU": 2, "RNN_TANH": 0, "RNN_RELU": 0}
"""Which block of rows makes what is new in a state: without it a state that is zero stays zero."""


def _module(root: nn.Module, states: States) -> nn.RNNBase:
    module = root.get_submodule(states.layer)
    assert isinstance(module, nn.RNNBase)  # noqa: S101  # what states are of
    return module


def _directions(module: nn.RNNBase) -> int:
    return 2 if module.bidirectional else 1


def _ends(module: nn.RNNBase) -> list[str]:
    """How names of parameters of each layer and direction end, in the order of last states."""
    ways = ("", "_reverse")[: _directions(module)]
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]


def _flows(module: nn.RNNBase, states: States) -> list[tuple[Flow, list[int]]]:
    """Who reads outside of the module, and the layers and directions whose states lie abreast."""
    count = len(_ends(module))
    found = [(flow, [place]) for place, flow in states.final.items()]
    if states.output is not None:
        found.append((states.output, list(range(count - _directions(module), count))))
    return found


def _by_gate(module: nn.RNNBase, key: str) -> Tensor:
    """Rows of a parameter by gate and state, `[G, H, N]`; `N` is 1 for biases."""
    parameter = module.get_parameter(key).detach()
    rows: Tensor = parameter.view(-1, module.hidden_size, parameter[0].numel())
    return rows


def _is_silent(module: nn.RNNBase, end: str) -> Tensor:
    """States that are zero at every step, if they are before the first one, `[H]`."""
    keys = [key for key in module._parameters if key.endswith(end)]
    new = torch.cat([_by_gate(module, key)[NEW[module.mode]] for key in keys], dim=1)  # [H, N]
    return (new == 0).all(dim=1)


def _is_alone(module: nn.RNNBase, place: int) -> Tensor:
    """States that no other state of the module reads, `[H]`: neither beside nor above them."""
    count, ways, names = module.hidden_size, _directions(module), _ends(module)
    beside = _by_gate(module, f"weight_hh{names[place]}") == 0  # [G, H, H]
    own = torch.eye(count, dtype=torch.bool, device=beside.device)
    alone: Tensor = (beside | own).flatten(0, 1).all(dim=0)
    layer, way = divmod(place, ways)
    for above in names[(layer + 1) * ways : (layer + 2) * ways]:
        columns = module.get_parameter(f"weight_ih{above}").detach()  # [G * H, ways * H]
        alone = alone & (columns.unflatten(1, (ways, count))[:, way] == 0).all(dim=0)
    return alone


def _dead(root: nn.Module, states: States, masks: Masks) -> tuple[Tensor, Tensor]:
    """Per layer and direction, states that can go, as many of each; and the silent ones of them.

    `[layers * directions, H]` both. One of each always stays.
    """
    module = _module(root, states)
    names = _ends(module)
    unread = torch.stack([_is_alone(module, place) for place in range(len(names))])
    silent = torch.stack([_is_silent(module, end) for end in names])
    moves = torch.ones_like(silent)
    for flow, places in _flows(module, states):
        unread[places] &= is_unread(root, flow).view(len(places), -1)
        moves[places] &= can_move(root, flow, masks).view(len(places), -1)
    dead = unread | (silent & moves)
    count = min(int(dead.sum(dim=1).min()), module.hidden_size - 1)
    dead &= dead.cumsum(dim=1) <= count
    return dead, silent & dead


def remove_states_(root: nn.Module, states: States, masks: dict[str, Tensor]) -> list[list[int]]:
    """Remove states without an effect that is not constant, in place.

    Returns:
        Which stay, for each layer and direction; nothing where all do.
    """
    dead, silent = _dead(root, states, masks)
    if not dead.any():
        return []
    for flow, places in _flows(_module(root, states), states):
        fold_(root, flow, silent[places].flatten(), masks)
    kept = [(~gone).nonzero().flatten().tolist() for gone in dead]
    keep_states_(root, states, kept, masks)
    return kept


def keep_states_(
    root: nn.Module, states: States, kept: Sequence[Sequence[int]], masks: dict[str, Tensor]
) -> None:
    """Leave only some states of a recurrent layer, in place, with all that reads them.

    Args:
        root: holds the layer.
        states: who reads them.
        kept: rising indices for each layer and direction, equally many.
        masks: of single weights; narrowed, too.
    """
    module, name = _module(root, states), states.layer
    size, ways = module.hidden_size, _directions(module)
    device = next(module.parameters()).device
    indices = [torch.tensor(places, device=device) for places in kept]
    for flow, places in _flows(module, states):
        keep_(root, flow, _abreast([indices[place] for place in places], size).tolist(), masks)
    for place, (end, index) in enumerate(zip(_ends(module), indices, strict=True)):
        gates = len(module.get_parameter(f"weight_hh{end}")) // size
        for key in [key for key in module._parameters if key.endswith(end)]:
            narrow_(root, name, key, 0, _abreast([index] * gates, size), masks)
        narrow_(root, name, f"weight_hh{end}", 1, index, masks)
        below = indices[: place - place % ways][-ways:]
        if below:
            narrow_(root, name, f"weight_ih{end}", 1, _abreast(below, size), masks)
    say_size_(module, 0, len(kept[0]))


def _abreast(indices: Sequence[Tensor], size: int) -> Tensor:
    """Indices into blocks of a size, as indices into all blocks side by side."""
    return torch.cat([index + place * size for place, index in enumerate(indices)])


def names_of(root: nn.Module, states: States) -> list[str]:
    """The matrices that read the states of each layer and direction in the next step."""
    return [f"{states.layer}.weight_hh{end}" for end in _ends(_module(root, states))]

"""What the matrices of recurrent layers are multiplied with, in padded tensors or packed sequences.

Inputs, states before a step, and states before they are projected.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.streams import Call
from hf_prune.weights.inputs import first_argument, main_tensor

MAKERS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN_TANH": nn.RNN,
    "RNN_RELU": partial(nn.RNN, nonlinearity="relu"),
}
"""Modules by what they compute: a subclass may be made in another way."""
States = tuple[Tensor | None, ...]
"""First states: of an LSTM two, else one; `[layers * directions, B, ...]`."""


@dataclass(frozen=True)
class _Steps:
    """Sequences side by side, `[T, B, C]`, and how long each is where they were packed, `[B]`."""

    values: Tensor
    lengths: Tensor | None

    def rows(self) -> Tensor:
        """All steps that there are, `[steps, C]`."""
        if self.lengths is None:
            return self.values.flatten(0, 1)
        return self.values[self._there()]

    def _there(self) -> Tensor:
        assert self.lengths is not None  # noqa: S101  # asked of packed ones
        times = torch.arange(len(self.values))
        return (times[:, None] < self.lengths).to(self.values.device)  # [T, B]

    def flip(self) -> "_Steps":
        """Every sequence from its own end to its start."""
        if self.lengths is None:
            return replace(self, values=self.values.flip(0))
        times = torch.arange(len(self.values))[:, None]
        places = torch.where(times < self.lengths, self.lengths - 1 - times, times)  # [T, B]
        index = places.to(self.values.device)[..., None].expand_as(self.values)
        return replace(self, values=self.values.gather(0, index))

    def through(self, module: nn.RNNBase, states: States) -> "_Steps":
        """The states of one layer and direction."""
        given: Any = self.values
        if self.lengths is not None:
            given = pack_padded_sequence(given, self.lengths, enforce_sorted=False)
        known = tuple(state for state in states if state is not None)
        first: Any = known if len(known) > 1 else (*known, None)[0]
        output = module(given, first)[0]
        if self.lengths is not None:
            output = pad_packed_sequence(output, total_length=len(self.values))[0]
        return replace(self, values=output)

    def before(self, first: Tensor | None) -> "_Steps":
        """What a step finds: the values of the step before it, and at the start the first state."""
        values = self.values.roll(1, 0)
        values[0] = 0 if first is None else first[0]
        return replace(self, values=values)


def _read(module: nn.RNNBase, call: Call) -> tuple[_Steps, States]:
    """The sequences that a recurrent module was called with, and its first states."""
    value = first_argument(module, call)
    start = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    states = tuple(start) if isinstance(start, tuple | list) else (start,)
    if isinstance(value, PackedSequence):
        return _Steps(*pad_packed_sequence(value)), states
    value = main_tensor(module, call)
    if value.ndim == 2:  # one sequence
        states = tuple(None if state is None else state.unsqueeze(1) for state in states)
        return _Steps(value.unsqueeze(1), None), states
    return _Steps(value.transpose(0, 1) if module.batch_first else value, None), states


def _one_layer(module: nn.RNNBase, end: str) -> nn.RNNBase:
    """One layer and direction of a recurrent module, as a module of its own, time first."""
    weight: Tensor = getattr(module, f"weight_ih{end}")
    kwargs: dict[str, Any] = {"bias": module.bias}
    if module.proj_size:
        kwargs["proj_size"] = module.proj_size
    with torch.device("meta"):
        make: Any = MAKERS[module.mode]
        single: nn.RNNBase = make(weight.shape[1], module.hidden_size, **kwargs)
    state = {k.removesuffix("_l0"): k for k, _ in single.named_parameters()}
    single.load_state_dict(
        {k: getattr(module, stem + end).detach() for stem, k in state.items()}, assign=True
    )
    return single.eval()


def _unprojected(single: nn.RNNBase, inputs: _Steps, before: _Steps, states: States) -> _Steps:
    """The states of an LSTM layer before their projection, from its inputs and projected states."""
    own: Any = single
    gates = linear(inputs.values, own.weight_ih_l0) + linear(before.values, own.weight_hh_l0)
    if single.bias:
        gates = gates + own.bias_ih_l0 + own.bias_hh_l0  # [T, B, 4 * H]
    first = states[1] if len(states) > 1 else None
    cell = gates.new_zeros(single.hidden_size) if first is None else first[0]
    found = []
    for step in gates:
        enter, forget, new, give = step.chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        found.append(give.sigmoid() * cell.tanh())
    return replace(inputs, values=torch.stack(found))  # [T, B, H]


def recurrent_rows(module: nn.RNNBase, call: Call, key: str) -> Tensor:
    """What a matrix of a recurrent module was multiplied with in one call, `[steps, C]`.

    Args:
        module: of one or more layers, in one or both directions.
        call: with a padded tensor or a packed sequence.
        key: `weight_ih_l0`, `weight_hh_l1_reverse`, `weight_hr_l0` ...
    """
    steps, states = _read(module, call)
    ways = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        results = []
        for way, name in enumerate(ways):
            end = f"_l{layer}{name}"
            inputs = steps.flip() if way else steps
            if key == f"weight_ih{end}":
                return steps.rows()
            index = layer * len(ways) + way
            first = tuple(None if s is None else s[index : index + 1] for s in states)
            single = _one_layer(module, end)
            output = inputs.through(single, first)
            before = output.before(first[0])
            if key == f"weight_hh{end}":
                return before.rows()
            if key == f"weight_hr{end}":
                return _unprojected(single, inputs, before, first).rows()
            results.append((output.flip() if way else output).values)
        steps = replace(steps, values=torch.cat(results, dim=-1))
    raise UnsupportedModelError(f"{type(module).__name__} has no matrix {key!r} to follow.")


def cell_rows(module: nn.RNNCellBase, call: Call, key: str) -> Tensor:
    """What a matrix of a recurrent cell is multiplied with, `[B, C]`: the input, or the state."""
    value = main_tensor(module, call)
    if key == "weight_ih":
        return value.reshape(-1, value.shape[-1])
    state = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    state = state[0] if isinstance(state, tuple) else state
    rows = value.numel() // value.shape[-1]
    if state is None:
        return value.new_zeros(rows, module.hidden_size)
    before: Tensor = state.reshape(rows, module.hidden_size)
    return before

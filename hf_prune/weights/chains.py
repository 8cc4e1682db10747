"""Lists of layers that simply pass hidden states on, in models that nobody has described."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.sites import base_model
from hf_prune.statistics.streams import Call
from hf_prune.weights.walk import Inputs, call_model

PLAIN = (type(None), bool, int, float, str)
"""Types of arguments that no layer can have written anything into."""


def _lists(base: nn.Module) -> list[list[str]]:
    """The names of the modules in each list that is in no other list."""
    found: dict[str, int] = {}
    for name, module in base.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            found[name] = len(module)
    return [[f"{name}.{index}" for index in range(count)] for name, count in found.items()]


def _tensors(value: Any) -> list[Tensor] | None:
    """The tensors of an argument; None, where something else could hold what a layer computed."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PLAIN):
        return []
    if isinstance(value, tuple):
        parts = [_tensors(item) for item in value]
        return None if None in parts else [t for part in parts for t in part or ()]
    return None


def _writes(value: Any) -> int:
    """How often a tensor has been written to in place."""
    return value._version if isinstance(value, Tensor) else 0


class _Watch:
    """What the layers of one list were called with and gave, in the order of their calls."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.hidden: list[Any] = []
        self.rest: list[Call] = []
        self.given: list[tuple[Any, int]] = []  # and how often it had been written to
        self.found: list[int] = []

    def before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            self.names.append(name)
            self.hidden.append(args[0] if args else rest.pop("hidden_states", None))
            self.found.append(_writes(self.hidden[-1]))
            self.rest.append(Call(args[1:], rest))

        return hook

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.given.append((hidden, _writes(hidden)))

    def is_chain(self, names: Sequence[str]) -> bool:
        """Whether each layer ran once, on what the one before gave, and on nothing newer."""
        if self.names != list(names) or len(self.given) != len(names):
            return False
        if not all(isinstance(hidden, Tensor) and hidden.ndim == 3 for hidden in self.hidden):
            return False
        known: set[int] = set()
        for index, call in enumerate(self.rest):
            given = _tensors((*call.args, *call.kwargs.values()))
            if given is None or (index and not {id(tensor) for tensor in given} <= known):
                return False
            known |= {id(tensor) for tensor in given}
        pairs = zip(self.given, self.hidden[1:], self.found[1:], strict=False)
        return all(hidden is now and writes == then for (hidden, writes), now, then in pairs)


@torch.no_grad()
def chained_layers(model: PreTrainedModel, batch: Inputs) -> list[str]:
    """Layers, relative to the base model, that can be run one after the other, as one pass shows.

    Each runs once, on the very tensor that the one before it gave, and otherwise on tensors that
    the first one was given, too. Nothing, for models with encoder and decoder.
    """
    if model.config.is_encoder_decoder:
        return []
    base, watches, handles = base_model(model), list[tuple[list[str], _Watch]](), []
    for names in _lists(base):
        watch = _Watch()
        watches.append((names, watch))
        for name in names:
            layer = base.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(watch.before(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(watch.after))
    try:
        call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [name for names, watch in watches if watch.is_chain(names) for name in names]

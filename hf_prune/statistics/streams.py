"""Two streams: what the dense and the pruned network compute, one layer of each at a time.

The other half of every re-fit, beside `moments`. The dense network runs once, to know how each of
its layers is called and what enters the first. From then on only hidden states are kept, one for
each network, and layers are run alone, in order. What the pruned network computes therefore
already contains what was changed in earlier layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_prune.sites import Site, base_model, projection
from hf_prune.statistics.batches import Batch, forward_kwargs, sequence_mask, to_device


@dataclass
class Call:
    """How one layer was called on one batch, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """One batch on its way through both networks. `calls` is by the name of the layer.

    `pruned_calls` are those of the pruned network, where they differ: a decoder is called with what
    its encoder gave.
    """

    mask: Tensor  # [B, T], True for real tokens
    dense: Tensor  # [B, T, E]
    pruned: Tensor  # [B, T, E]
    calls: dict[str, Call]
    order: list[str] = field(default_factory=list)  # names of layers, each as often as it ran
    pruned_calls: dict[str, Call] | None = None


def first_tensor(value: Any) -> Tensor:
    """The hidden states that a layer gave, alone or first of several things."""
    tensor = value
    while isinstance(tensor, tuple):  # a packed sequence is one, too
        tensor = tensor[0]
    assert isinstance(tensor, Tensor)  # noqa: S101  # a layer gives hidden states
    return tensor


class Enough(Exception):  # it ends a pass early, and is no error
    """Everything that was to be seen has been seen."""


@contextmanager
def in_eval(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside a `with` block, and each module in its own mode after it.

    Modules that are put into a model meanwhile get the mode of the model.
    """
    modes = [model.training for model in models]
    own = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)
        for module, training in own:  # a frozen norm stays in eval mode while all else trains
            module.training = training


@contextmanager
def recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Call]]]:
    """What each of the layers is called with while the model runs, the first time that it is."""
    record: dict[str, tuple[Tensor, Call]] = {}
    handles: list[RemovableHandle] = []
    for name in layers:

        def keep(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            record.setdefault(name, (hidden.detach(), Call(args[1:], rest)))

        hook = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        handles.append(hook)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_order(model: nn.Module, layers: Sequence[str]) -> Iterator[list[str]]:
    """The names of the layers in the order in which they run, each as often as it does."""
    order: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: order.append(name)
        )
        for name in layers
    ]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def segments(layers: Sequence[str], order: Sequence[str]) -> list[list[str]]:
    """Runs of layers that belong together: one layer alone, or shared layers with all their runs.

    Args:
        layers: names, in the order of the model.
        order: as they ran, from `in_order`.

    Returns:
        For each segment the names of its layers, each as often as it runs. No layer is in two.
    """
    found: list[list[str]] = []
    for layer in layers:
        if any(layer in segment for segment in found):
            continue
        if order.count(layer) < 2:
            found.append([layer])
            continue
        first, last = order.index(layer), len(order) - list(order)[::-1].index(layer)
        while any(name in order[last:] for name in order[first:last]):
            last += 1
        found.append(list(order[first:last]))
    return found


def start_streams(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[str]
) -> list[Stream]:
    """Run the dense network once, to know how its layers are called and what enters the first.

    Args:
        dense: in eval mode.
        pruned: only its device is read: nothing before the first layer was changed.
        batches: without labels, or with labels that are not used.
        layers: names of the layers relative to the base model, in the order in which they run.

    Returns:
        One stream for each batch, before the first layer.
    """
    streams = []
    for batch in batches:
        batch = to_device(batch, dense.device)
        base = base_model(dense)
        with recorded(base, layers) as record, in_order(base, layers) as order:
            dense(**forward_kwargs(dense, batch, labels=False))
        first = record[layers[0]][0]
        calls = {name: call for name, (_, call) in record.items()}
        mask = sequence_mask(dense, batch, layers[0], first)
        streams.append(Stream(mask, first, first.to(pruned.device), calls, order))
    return streams


def run_layer(base: nn.Module, layer: str, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states after one layer, `[B, T, E]`, called as it was in the dense network."""
    return first_tensor(base.get_submodule(layer)(hidden, *call.args, **call.kwargs))


@dataclass
class Seen:
    """What one site saw when its layer ran: `[B, T, ...]` each.

    `after` is what the module that gets the sum made of it; the sum itself, where there is none.
    `totals` has the sum of each run, where the layer runs several times.
    """

    inputs: Tensor | None = None
    output: Tensor | None = None
    total: Tensor | None = None
    after: Tensor | None = None
    totals: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(base: nn.Module, site: Site, *, stop: bool = False) -> Iterator[Seen]:
    """Watch the output projection of a site, and the sum of its output and the residual.

    Args:
        base: whose layers are run inside the `with` block.
        site: of it.
        stop: end the block as soon as the sum has been seen. What follows in the layer is not run.
    """
    seen = Seen()

    def at_projection(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.output = args[0].detach(), output.detach()

    def at_sum(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.total = args[0].detach()
        seen.totals.append(seen.total)
        if stop:
            raise Enough

    def after_sum(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.after = first_tensor(output).detach()

    def at_end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.total = seen.after = first_tensor(output).detach()
        seen.totals.append(seen.total)

    handles = [projection(base, site.gate.module).register_forward_hook(at_projection)]
    if site.sum_module:
        handles.append(base.get_submodule(site.sum_module).register_forward_pre_hook(at_sum))
        handles.append(base.get_submodule(site.sum_module).register_forward_hook(after_sum))
    else:
        handles.append(base.get_submodule(site.layer_module).register_forward_hook(at_end))
    try:
        yield seen
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def by_layer(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The sites of each layer, by the layer's name, in the order of the model."""
    layers: dict[str, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer_module, []).append(site)
    return layers


def by_stack(layers: Iterable[str]) -> dict[str, list[str]]:
    """The layers of each list of layers, by its path: towers and decoders have lists of their own.

    Args:
        layers: names, in the order of the model.
    """
    stacks: dict[str, list[str]] = {}
    for layer in layers:
        stacks.setdefault(layer.rpartition(".")[0], []).append(layer)
    return stacks

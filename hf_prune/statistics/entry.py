"""What enters the layers of a model that have no weights yet: the rest of it runs without them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites import base_model
from hf_prune.statistics.batches import Batch, forward_kwargs, token_mask
from hf_prune.statistics.streams import Enough, Stream, in_order, recorded

Give = Callable[[Tensor], Any]
"""What stands in for a layer: the hidden states that it got, as a layer of this kind gives them."""


def first_inputs(
    model: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[str]
) -> list[Stream]:
    """What enters the first layer, and how the others are called, without running any.

    Args:
        model: in eval mode, with weights outside of its layers at least.
        batches: without labels, or with labels that are not used.
        layers: names of the layers relative to the base model, in the order of the model.

    Returns:
        One stream for each batch, before the first layer.

    Raises:
        UnsupportedModelError: where layers do not simply pass hidden states on.
    """
    give = _way_to_pass_on(model, batches[0], layers)
    return [_enter(model, batch, layers, give) for batch in batches]


def _alone(hidden: Tensor) -> Tensor:
    return hidden


def _first_of_two(hidden: Tensor) -> tuple[Tensor, None]:
    return hidden, None


def _way_to_pass_on(model: PreTrainedModel, batch: Batch, layers: Sequence[str]) -> Give:
    """How the layers give hidden states: alone, or first of several things."""
    try:
        _enter(model, batch, layers, _alone)
        return _alone
    except Exception as error:  # whatever a model does with what it did not expect
        with contextlib.suppress(Exception):  # then the first error says more
            _enter(model, batch, layers, _first_of_two)
            return _first_of_two
        raise error


def _enter(model: PreTrainedModel, batch: Batch, layers: Sequence[str], give: Give) -> Stream:
    """One batch before the first layer. What follows the layers in the base model runs, too."""
    base = base_model(model)
    with (
        _standing_in(base, layers, give),
        recorded(base, layers) as record,
        in_order(base, layers) as order,
        contextlib.suppress(Enough),
    ):
        model(**forward_kwargs(model, batch, labels=False))
    shapes = {hidden.shape for hidden, _ in record.values()}
    if order != list(layers) or len(shapes) > 1:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} do not simply pass hidden states on, each once "
            "and in one chain: load the model and use compress()."
        )
    hidden = record[layers[0]][0]
    calls = {name: call for name, (_, call) in record.items()}
    return Stream(token_mask(model, batch), hidden, hidden, calls)


@contextlib.contextmanager
def _standing_in(base: nn.Module, layers: Sequence[str], give: Give) -> Iterator[None]:
    """Layers that compute nothing, and a base model that ends the pass before the head."""

    def end(*args: object) -> None:
        raise Enough

    modules = [base.get_submodule(layer) for layer in layers]
    for module in modules:
        module.forward = lambda hidden, *args, **kwargs: give(hidden)
    handle = base.register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()
        for module in modules:
            del module.forward

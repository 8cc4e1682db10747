"""Reconstruction: what is left is re-fitted, in sequence, to what the dense network computed.

Layer after layer, attention before feed-forward. Each narrowed output projection sees the inputs
that the already pruned and re-fitted network really gives it, and is fitted to the dense network's
sum of residual and output, so that it also repairs what earlier sites lost. Two streams of hidden
states are kept, and one layer of each network is run at a time.

Sources: least-squares reconstruction of pruned layers, He et al. 2017, arXiv:1707.06168; the
dense target for drifted inputs is the asymmetric calibration of GPTAQ, arXiv:2504.02692, applied
here to the sum after the residual, so that what the residual lost is part of the target.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites import Site, base_model, find_sites, logical_weight, projection
from hf_prune.statistics.batches import (
    Batch,
    by_token,
    check_one_sequence,
    forward_kwargs,
    to_device,
    token_mask,
)
from hf_prune.statistics.moments import Moments, solve_towards


@dataclass
class _Call:
    """How one layer was called on one batch, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Stream:
    """One batch on its way through both networks."""

    mask: Tensor  # [B, T]
    dense: Tensor  # [B, T, E]
    pruned: Tensor  # [B, T, E]
    calls: dict[str, _Call]


def _first(value: Any) -> Tensor:
    tensor = value[0] if isinstance(value, tuple) else value
    assert isinstance(tensor, Tensor)  # noqa: S101  # a layer gives hidden states
    return tensor


@contextmanager
def _recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, _Call]]]:
    """What each of the layers is called with while the model runs."""
    record: dict[str, tuple[Tensor, _Call]] = {}
    handles: list[RemovableHandle] = []
    for name in layers:

        def keep(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            record[name] = (hidden.detach(), _Call(args[1:], rest))

        hook = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        handles.append(hook)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _start(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[str]
) -> list[_Stream]:
    """Run the dense network once, to know how its layers are called and what enters the first."""
    streams = []
    for batch in batches:
        batch = to_device(batch, dense.device)
        with _recorded(base_model(dense), layers) as record:
            dense(**forward_kwargs(dense, batch, labels=False))
        first = record[layers[0]][0]
        calls = {name: call for name, (_, call) in record.items()}
        streams.append(_Stream(token_mask(dense, batch), first, first.to(pruned.device), calls))
    return streams


@dataclass
class _Seen:
    """What one site saw when its layer ran: `[B, T, ...]` each."""

    inputs: Tensor | None = None
    output: Tensor | None = None
    total: Tensor | None = None


@contextmanager
def _watched(base: nn.Module, site: Site) -> Iterator[_Seen]:
    """Watch the output projection of a site, and the sum of its output and the residual."""
    seen = _Seen()

    def at_projection(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.output = args[0].detach(), output.detach()

    def at_sum(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.total = args[0].detach()

    def at_end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.total = _first(output).detach()

    handles = [projection(base, site.gate.module).register_forward_hook(at_projection)]
    if site.sum_module:
        handles.append(base.get_submodule(site.sum_module).register_forward_pre_hook(at_sum))
    else:
        handles.append(base.get_submodule(site.layer_module).register_forward_hook(at_end))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run(base: nn.Module, layer: str, hidden: Tensor, call: _Call) -> Tensor:
    return _first(base.get_submodule(layer)(hidden, *call.args, **call.kwargs))


def _dense_sums(
    base: nn.Module, sites: Sequence[Site], stream: _Stream
) -> tuple[dict[str, Tensor], Tensor]:
    """The dense network's sums at each site of a layer, and the layer's output."""
    layer = sites[0].layer_module
    with ExitStack() as stack:
        seen = {site.name: stack.enter_context(_watched(base, site)) for site in sites}
        output = _run(base, layer, stream.dense, stream.calls[layer])
    sums = {name: item.total for name, item in seen.items() if item.total is not None}
    return sums, output


def _fit(
    base: nn.Module, site: Site, streams: Sequence[_Stream], sums: Sequence[Tensor], ridge: float
) -> None:
    """Re-fit one output projection to the dense sums, given the inputs it has now."""
    module = projection(base, site.gate.module)
    weight = logical_weight(module).detach()
    moments = Moments.zeros(weight.shape[1], weight.shape[0], weight.device)
    for stream, dense_sum in zip(streams, sums, strict=True):
        with _watched(base, site) as seen:
            _run(base, site.layer_module, stream.pruned, stream.calls[site.layer_module])
        assert seen.inputs is not None and seen.output is not None and seen.total is not None  # noqa: S101, PT018  # the layer ran
        residual = seen.total - seen.output.view_as(seen.total)
        target = dense_sum.to(residual.device) - residual
        mask = stream.mask.to(residual.device)
        moments.add(by_token(seen.inputs, mask), by_token(target, mask))  # [real tokens, .]
    bias = None if module.bias is None else module.bias.detach()
    new, new_bias = solve_towards(moments.over_processes(), weight, bias, ridge)
    _write(module, new, new_bias)


def _write(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    if PartialState().num_processes > 1:  # equal sums give equal solutions, but only up to rounding
        weight = broadcast(weight.contiguous())
        bias = None if bias is None else broadcast(bias)
    logical_weight(module).data.copy_(weight)
    if bias is not None:
        module.bias.data.copy_(bias)  # type: ignore[operator]  # it has one


def _by_layer(sites: Sequence[Site]) -> dict[str, list[Site]]:
    layers: dict[str, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer_module, []).append(site)
    return layers


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    ridge: float = 1e-2,
    changed: Mapping[str, object] | None = None,
) -> list[str]:
    """Re-fit, in place, the output projections of a pruned model to its dense original.

    Args:
        model: after `remove_units`. Evaluated in eval mode and left as it was.
        dense: the same model before; it is not changed.
        batches: calibration batches, of which padding is never counted. Labels are not used.
        ridge: pull towards the old weights, relative to the mean diagonal of the Gram matrix.
        changed: names of the sites to re-fit. All sites from the first narrowed one on, if not
            given: a site that lost nothing still repairs what earlier ones lost.

    Returns:
        The names of the sites that were re-fitted, in order.

    Raises:
        NumericsError: when a sum is not finite.
        UnsupportedModelError: for encoder-decoders, shared layers, images and sound.
    """
    modes = model.training, dense.training
    model.eval()
    dense.eval()
    try:
        return _reconstruct(model, dense, batches, ridge, changed)
    finally:
        model.train(modes[0])
        dense.train(modes[1])


def _reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    ridge: float,
    changed: Mapping[str, object] | None,
) -> list[str]:
    sites = find_sites(model)
    check_one_sequence(model, sites, "reconstruction")
    if any(site.runs > 1 for site in sites):
        raise UnsupportedModelError(
            f"{model.config.model_type} runs its layers several times, and reconstruction fits "
            "each once. Use reconstruct: false."
        )
    units = {site.name: site.units for site in find_sites(dense)}
    narrowed = [site.name for site in sites if site.units < units[site.name]]
    if changed is None:
        names = [site.name for site in sites]
        chosen = set(names[names.index(narrowed[0]) :]) if narrowed else set()
    else:
        chosen = set(changed)
    layers = _by_layer(sites)
    streams = _start(dense, model, batches, list(layers))
    fitted = []
    for layer, layer_sites in layers.items():
        here = [site for site in layer_sites if site.name in chosen]
        sums: list[dict[str, Tensor]] = []
        for stream in streams:
            stream_sums, output = _dense_sums(base_model(dense), here or layer_sites[-1:], stream)
            sums.append(stream_sums)
            stream.dense = output
        for site in here:
            _fit(base_model(model), site, streams, [s[site.name] for s in sums], ridge)
            fitted.append(site.name)
        for stream in streams:
            stream.pruned = _run(base_model(model), layer, stream.pruned, stream.calls[layer])
    return fitted

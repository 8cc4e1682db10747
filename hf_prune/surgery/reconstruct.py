"""Reconstruction: what is left is re-fitted, in sequence, to what the dense network computed.

Layer after layer, attention before feed-forward. Each narrowed output projection sees the inputs
that the already pruned and re-fitted network really gives it, and is fitted to the dense network's
sum of residual and output, so that it also repairs what earlier sites lost. The walk itself is in
`statistics.streams`.

Sources: least-squares reconstruction of pruned layers, He et al. 2017, arXiv:1707.06168; the
dense target for drifted inputs is the asymmetric calibration of GPTAQ, arXiv:2504.02692, applied
here to the sum after the residual, so that what the residual lost is part of the target.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.sites import Site, base_model, find_sites, logical_weight, projection
from hf_prune.statistics.batches import Batch
from hf_prune.statistics.moments import Moments, solve_towards
from hf_prune.statistics.streams import (
    Stream,
    both_in_eval,
    by_layer,
    run_layer,
    start_streams,
    watched,
)


def _dense_sums(
    base: nn.Module, sites: Sequence[Site], stream: Stream
) -> tuple[dict[str, Tensor], Tensor]:
    """The dense network's sums at each site of a layer, and the layer's output."""
    layer = sites[0].layer_module
    with ExitStack() as stack:
        seen = {site.name: stack.enter_context(watched(base, site)) for site in sites}
        output = run_layer(base, layer, stream.dense, stream.calls[layer])
    sums = {name: item.total for name, item in seen.items() if item.total is not None}
    return sums, output


def _fit(
    base: nn.Module, site: Site, streams: Sequence[Stream], sums: Sequence[Tensor], ridge: float
) -> None:
    """Re-fit one output projection to the dense sums, given the inputs it has now."""
    module = projection(base, site.gate.module)
    weight = logical_weight(module).detach()
    moments = Moments.zeros(weight.shape[1], weight.shape[0], weight.device)
    for stream, dense_sum in zip(streams, sums, strict=True):
        with watched(base, site) as seen:
            run_layer(base, site.layer_module, stream.pruned, stream.calls[site.layer_module])
        assert seen.inputs is not None and seen.output is not None and seen.total is not None  # noqa: S101, PT018  # the layer ran
        residual = seen.total - seen.output
        target = dense_sum.to(residual.device) - residual
        mask = stream.mask.to(residual.device)
        moments.add(seen.inputs[mask], target[mask])  # [B, T, .] -> [real tokens, .]
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
    """
    with both_in_eval(model, dense):
        return _reconstruct(model, dense, batches, ridge, changed)


def _reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    ridge: float,
    changed: Mapping[str, object] | None,
) -> list[str]:
    sites = find_sites(model)
    units = {site.name: site.units for site in find_sites(dense)}
    narrowed = [site.name for site in sites if site.units < units[site.name]]
    if changed is None:
        names = [site.name for site in sites]
        chosen = set(names[names.index(narrowed[0]) :]) if narrowed else set()
    else:
        chosen = set(changed)
    layers = by_layer(sites)
    streams = start_streams(dense, model, batches, list(layers))
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
            stream.pruned = run_layer(base_model(model), layer, stream.pruned, stream.calls[layer])
    return fitted

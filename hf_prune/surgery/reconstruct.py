"""Reconstruction: what is left is re-fitted, in sequence, to what the dense network computed.

Layer after layer, attention before feed-forward. Each narrowed output projection sees the inputs
that the already pruned and re-fitted network really gives it, and is fitted to the dense network's
sum of residual and output, so that it also repairs what earlier sites lost. Some examples are held
out of each fit: they choose the ridge, and whether the fit is kept at all. The walk itself is in
`statistics.streams`.

Sources: least-squares reconstruction of pruned layers, He et al. 2017, arXiv:1707.06168; the
dense target for drifted inputs is the asymmetric calibration of GPTAQ, arXiv:2504.02692, applied
here to the sum after the residual, so that what the residual lost is part of the target.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites import (
    ALL_KINDS,
    Site,
    base_model,
    find_sites,
    logical_weight,
    projection,
)
from hf_prune.statistics.batches import (
    Batch,
    by_token,
    example_seed,
    main_input,
    token_mask,
)
from hf_prune.statistics.moments import Moments, fit_checked
from hf_prune.statistics.streams import (
    Seen,
    Stream,
    both_in_eval,
    by_layer,
    run_layer,
    start_streams,
    watched,
)

HELD_OUT_EVERY = 5
"""About one example in so many is held out of the fits and judges them."""
RIDGE_STEPS = (0.1, 1.0, 10.0)
"""Multiples of the ridge that held-out tokens choose from."""
MAX_STORED_BYTES = 1 << 30
"""Dense sums are kept in memory up to here; beyond, the dense layers are run again where needed."""

Sums = dict[str, Tensor]
"""By output projection, the dense sum of residual and output on one batch, `[B, T, E]`."""


def _watch_all(base: nn.Module, sites: Sequence[Site], stack: ExitStack) -> dict[str, Seen]:
    return {site.gate.module: stack.enter_context(watched(base, site)) for site in sites}


def _totals(seen: dict[str, Seen]) -> Sums:
    return {name: item.total for name, item in seen.items() if item.total is not None}


@dataclass
class DenseTargets:
    """What the dense network computes on calibration batches, for any number of re-fits to it.

    Attributes:
        dense: the network, in eval mode.
        sites: of it.
        batches: on which it was run.
        streams: how its layers are called, and what enters the first, batch by batch.
        stored: its sums at all sites, batch by batch; None where they need too much memory.
        held_out: which examples judge the fits, `[B]` for each batch.
    """

    dense: PreTrainedModel
    sites: Sequence[Site]
    batches: Sequence[Batch]
    streams: list[Stream]
    stored: list[Sums] | None
    held_out: list[Tensor]


def _held_out(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Which examples of a batch judge the fits, `[B]`.

    Drawn from the content of each, so that it depends neither on its batch nor on its process.
    """
    rows = zip(main_input(model, batch), token_mask(model, batch), strict=True)
    seeds = [example_seed(row, real, 0) for row, real in rows]
    return torch.tensor([seed % HELD_OUT_EVERY == 0 for seed in seeds])


@torch.no_grad()
def dense_targets(dense: PreTrainedModel, batches: Sequence[Batch]) -> DenseTargets:
    """Run the dense network once over the batches, and keep what re-fits need of it.

    Args:
        dense: evaluated in eval mode and left as it was.
        batches: calibration batches. Labels are not used.

    Raises:
        UnsupportedModelError: for layers that run several times.
    """
    sites, base = find_sites(dense), base_model(dense)
    if any(site.runs > 1 for site in sites):
        raise UnsupportedModelError(
            f"{dense.config.model_type} runs its layers several times, and reconstruction fits "
            "each once. Use reconstruct: false."
        )
    with both_in_eval(dense, dense):
        stored: list[Sums] | None = []
        streams: list[Stream] = []
        for batch in batches:
            with ExitStack() as stack:
                seen = _watch_all(base, sites if stored is not None else (), stack)
                streams += start_streams(dense, dense, [batch], list(by_layer(sites)))
            if stored is None:
                continue
            stored.append(_totals(seen))
            held = sum(t.numel() * t.element_size() for sums in stored for t in sums.values())
            if held > MAX_STORED_BYTES:
                stored = None
    held_out = [_held_out(dense, batch) for batch in batches]
    return DenseTargets(dense, sites, batches, streams, stored, held_out)


@dataclass
class _Walk:
    """A pruned network on its way through the layers, beside what the dense one computed."""

    model: PreTrainedModel
    targets: DenseTargets
    ridge: float
    hidden: list[Tensor] = field(default_factory=list)
    dense_hidden: list[Tensor] = field(default_factory=list)
    calls: list[Stream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls = self.targets.streams
        self.dense_hidden = [stream.dense for stream in self.targets.streams]
        self.hidden = [h.to(self.model.device) for h in self.dense_hidden]

    def dense_sums(self, layer_sites: Sequence[Site]) -> list[Sums]:
        """The dense network's sums at the sites of a layer. Layers are asked for in order."""
        if self.targets.stored is not None:
            return self.targets.stored
        base, layer = base_model(self.targets.dense), layer_sites[0].layer_module
        result = []
        for index, stream in enumerate(self.targets.streams):
            with ExitStack() as stack:
                seen = _watch_all(base, layer_sites, stack)
                call = stream.calls[layer]
                self.dense_hidden[index] = run_layer(base, layer, self.dense_hidden[index], call)
            result.append(_totals(seen))
        return result

    def enter(self, layers: Sequence[str]) -> None:
        """Begin a further stack: its layers may be called with what an earlier one has made."""
        model, dense = self.model, self.targets.dense
        self.calls = [start_streams(model, model, [b], layers)[0] for b in self.targets.batches]
        self.hidden = [stream.dense for stream in self.calls]
        if self.targets.stored is None:
            streams = [start_streams(dense, dense, [b], layers)[0] for b in self.targets.batches]
            self.dense_hidden = [stream.dense for stream in streams]

    def run(self, layer: str) -> None:
        """Take the pruned network through a layer."""
        base = base_model(self.model)
        for index, stream in enumerate(self.calls):
            self.hidden[index] = run_layer(base, layer, self.hidden[index], stream.calls[layer])

    def fit(self, site: Site, sums: Sequence[Sums], *, last: bool) -> None:
        """Re-fit a site; if it is the last of its layer, go on to the next layer."""
        base = base_model(self.model)
        module, layer = projection(base, site.gate.module), site.layer_module
        weight = logical_weight(module).detach()
        empty = Moments.zeros(weight.shape[1], weight.shape[0], weight.device)
        fitted, held_out = empty, empty.plus(empty)
        passed: list[Seen] = []
        for index, stream in enumerate(self.calls):
            with watched(base, site, stop=not last) as seen:
                run_layer(base, layer, self.hidden[index], stream.calls[layer])
            inputs, residual = inputs_and_residual(seen)
            target = sums[index][site.gate.module].to(residual.device) - residual
            mask = stream.mask.to(residual.device)
            judges = self.targets.held_out[index].to(residual.device).unsqueeze(1)  # [B, 1]
            for moments, part in ((held_out, mask & judges), (fitted, mask & ~judges)):
                moments.add(by_token(inputs, part), by_token(target, part))  # [real tokens, .]
            if last:
                passed.append(seen)
        bias = None if module.bias is None else module.bias.detach()
        ridges = [step * self.ridge for step in RIDGE_STEPS]
        new, new_bias, _ = fit_checked(
            fitted.over_processes(), held_out.over_processes(), weight, bias, ridges
        )
        write_(module, new, new_bias)
        if last:
            self._go_on(site, module, passed)

    def _go_on(self, site: Site, module: nn.Module, passed: Sequence[Seen]) -> None:
        """The layer's output with the new weights, from what was seen with the old ones."""
        base = base_model(self.model)
        after = base.get_submodule(site.sum_module) if site.sum_module else nn.Identity()
        for index, seen in enumerate(passed):
            inputs, residual = inputs_and_residual(seen)
            self.hidden[index] = after(residual + module(inputs).view_as(residual))


def inputs_and_residual(seen: Seen) -> tuple[Tensor, Tensor]:
    """What a projection saw, and what its output was added to."""
    assert seen.inputs is not None and seen.output is not None and seen.total is not None  # noqa: S101, PT018  # the layer ran
    return seen.inputs, seen.total - seen.output.view_as(seen.total)


def write_(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer the weights that a fit has found, the same on all processes."""
    if PartialState().num_processes > 1:  # equal sums give equal solutions, but only up to rounding
        weight = broadcast(weight.contiguous())
        bias = None if bias is None else broadcast(bias)
    logical_weight(module).data.copy_(weight)
    if bias is not None:
        module.bias.data.copy_(bias)  # type: ignore[operator]  # it has one


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    targets: DenseTargets,
    *,
    ridge: float = 1e-2,
    changed: Collection[str] | None = None,
) -> list[str]:
    """Re-fit, in place, the output projections of a pruned model to its dense original.

    Args:
        model: after `remove_units`. Evaluated in eval mode and left as it was.
        targets: of the dense model, from `dense_targets`.
        ridge: pull towards the old weights, relative to the mean diagonal of the Gram matrix.
            Held-out examples choose between a tenth of it, itself, and ten times it.
        changed: names of the sites to re-fit. All sites from the first narrowed one on, if not
            given: a site that lost nothing still repairs what earlier ones lost. Fused experts are
            not re-fitted; what comes after them is.

    Returns:
        The names of the sites that were re-fitted, in order.

    Raises:
        NumericsError: when a sum is not finite.
    """
    sites = find_sites(model)
    if changed is None:
        modules = _from_first_narrowed(model, targets.dense)
    else:
        modules = {site.gate.module for site in sites if site.name in changed}
    fitted = []
    with both_in_eval(model, targets.dense):
        walk = _Walk(model, targets, ridge)
        layers, stack = by_layer(targets.sites), ""
        for layer, dense_sites in layers.items():
            layer_sites = [site for site in sites if site.layer_module == layer]
            before, stack = stack, layer.rpartition(".")[0]
            if before not in ("", stack):
                walk.enter([name for name in layers if name.rpartition(".")[0] == stack])
            here = [site for site in layer_sites if site.gate.module in modules]
            sums = walk.dense_sums(dense_sites)
            ends = bool(here) and here[-1].name == layer_sites[-1].name
            ends = ends and _is_end(walk, here[-1])
            for site in here:
                walk.fit(site, sums, last=ends and site is here[-1])
                fitted.append(site.name)
            if not ends:
                walk.run(layer)
    return fitted


def _from_first_narrowed(model: PreTrainedModel, dense: PreTrainedModel) -> set[str]:
    """All output projections from the first one on that reads less than in the dense model."""
    left = {  # nothing, where all went
        (site.gate.module, site.gate.axis): site.units * site.gate.width
        for site in find_sites(model, ALL_KINDS)
    }
    before = find_sites(dense, ALL_KINDS)
    narrowed = [
        left.get((site.gate.module, site.gate.axis), 0) < site.units * site.gate.width
        for site in before
    ]
    first = narrowed.index(True) if any(narrowed) else len(before)
    return {site.gate.module for site in before[first:]}


def _is_end(walk: _Walk, site: Site) -> bool:
    """Whether the layer gives what comes after this site's sum, and nothing else happens to it."""
    base, stream = base_model(walk.model), walk.calls[0]
    with watched(base, site) as seen:
        output = run_layer(base, site.layer_module, walk.hidden[0], stream.calls[site.layer_module])
    return seen.after is not None and torch.equal(seen.after, output)


def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    ridge: float = 1e-2,
    changed: Collection[str] | None = None,
) -> list[str]:
    """Re-fit, in place, the output projections of a pruned model to its dense original.

    Args:
        model: after `remove_units`. Evaluated in eval mode and left as it was.
        dense: the same model before; it is not changed.
        batches: calibration batches, of which padding is never counted. Labels are not used.
        ridge: as in `refit`.
        changed: as in `refit`.

    Returns:
        The names of the sites that were re-fitted, in order.

    Raises:
        NumericsError: when a sum is not finite.
    """
    return refit(model, dense_targets(dense, batches), ridge=ridge, changed=changed)

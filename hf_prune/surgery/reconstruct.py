"""Reconstruction: what is left is re-fitted to what the dense network computed.

In sequence, by default: layer after layer, attention before feed-forward. Each narrowed output
projection sees the inputs that the already pruned and re-fitted network really gives it, and is
fitted to the dense network's sum of residual and output, so that it also repairs what earlier sites
lost. Or in parallel: each sees what the dense network gives it, of the columns that stay, and is
fitted to its own dense output. Some examples are held out of each fit: they choose the ridge, and
whether the fit is kept at all. The walk itself is in `statistics.streams`.

A layer that runs several times is fitted to the sums of all its runs together. What it computes
then enters its own later runs, which the fit did not see: so it is fitted again, and held-out
examples choose the round that stays, or none.

Sources: least-squares reconstruction of pruned layers, He et al. 2017, arXiv:1707.06168; the
dense target for drifted inputs is the asymmetric calibration of GPTAQ, arXiv:2504.02692, applied
here to the sum after the residual, so that what the residual lost is part of the target.
"""

import copy
import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import NumericsError
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune
from hf_prune.sites import (
    ALL_KINDS,
    Site,
    base_model,
    find_sites,
    logical_weight,
    projection,
)
from hf_prune.statistics.batches import Batch, by_token
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.moments import (
    Moments,
    Solve,
    rescaled,
    solve_towards,
)
from hf_prune.statistics.ridge import ridge_of
from hf_prune.statistics.streams import (
    Seen,
    Stream,
    by_layer,
    by_stack,
    in_eval,
    run_layer,
    segments,
    start_streams,
    watched,
)
from hf_prune.surgery.dense import DenseTargets, Sums, dense_targets, totals_of, watch_all
from hf_prune.surgery.fit import fit_, inputs_and_residual

SHARED_ROUNDS = 4
"""How often a layer that runs several times is fitted."""


@dataclass
class _Walk:
    """A pruned network on its way through the layers, beside what the dense one computed.

    Where `kept` says which units stayed, the fits are parallel: the dense network leads the way.
    """

    model: PreTrainedModel
    targets: DenseTargets
    ridge: float
    kept: Mapping[str, SitePlan] | None = None
    rescale: bool = False
    least_squares: bool = True
    hidden: list[Tensor] = field(default_factory=list)
    dense_hidden: list[Tensor] = field(default_factory=list)
    calls: list[Stream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lead = self.model if self.kept is None else self.targets.dense
        self.calls = self.targets.streams
        self.dense_hidden = [stream.dense for stream in self.targets.streams]
        self.hidden = [h.to(self.lead.device) for h in self.dense_hidden]

    def dense_sums(self, sites: Sequence[Site], runs: Sequence[str]) -> list[Sums]:
        """The dense network's sums at the sites of a segment. Segments are asked for in order."""
        if self.kept is not None:
            return []
        if self.targets.stored is not None:
            return self.targets.stored
        base, result = base_model(self.targets.dense), []
        for index, stream in enumerate(self.targets.streams):
            with ExitStack() as stack:
                seen = watch_all(base, sites, stack)
                for layer in runs:
                    hidden, call = self.dense_hidden[index], stream.calls[layer]
                    self.dense_hidden[index] = run_layer(base, layer, hidden, call)
            result.append(totals_of(seen))
        return result

    def enter(self, layers: Sequence[str]) -> None:
        """Begin a further stack: its layers may be called with what an earlier one has made."""
        lead, dense = self.lead, self.targets.dense
        self.calls = [start_streams(lead, lead, [b], layers)[0] for b in self.targets.batches]
        self.hidden = [stream.dense for stream in self.calls]
        if self.targets.stored is None and self.kept is None:
            streams = [start_streams(dense, dense, [b], layers)[0] for b in self.targets.batches]
            self.dense_hidden = [stream.dense for stream in streams]

    def run(self, runs: Sequence[str]) -> None:
        """Take the leading network through a segment."""
        base = base_model(self.lead)
        for index, stream in enumerate(self.calls):
            for layer in runs:
                hidden = self.hidden[index]
                self.hidden[index] = run_layer(base, layer, hidden, stream.calls[layer])

    def _seen(self, site: Site, index: int, runs: Sequence[str], *, stop: bool) -> Iterator[Seen]:
        """What a site sees of one batch in the leading network, run by run."""
        base, hidden = base_model(self.lead), self.hidden[index]
        left = runs.count(site.layer_module)
        for layer in runs:
            call = self.calls[index].calls[layer]
            if layer != site.layer_module:
                hidden = run_layer(base, layer, hidden, call)
                continue
            left -= 1
            with watched(base, site, stop=stop and not left) as seen:
                hidden = run_layer(base, layer, hidden, call)
            yield seen
            if not left:
                return

    def _input_and_target(
        self, site: Site, seen: Seen, total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What a run of the narrowed projection gets, and what it should give."""
        inputs, residual = inputs_and_residual(seen)
        if self.kept is None:
            assert total is not None  # noqa: S101  # the dense network ran
            return inputs, total.to(residual.device) - residual
        assert seen.output is not None and seen.total is not None  # noqa: S101, PT018  # the layer ran
        units = torch.tensor(self.kept[site.name].kept, device=inputs.device)
        steps = torch.arange(site.gate.width, device=inputs.device)
        columns = (units.unsqueeze(1) * site.gate.width + steps).flatten()  # [U] -> [U * D]
        device = self.model.device
        return inputs[..., columns].to(device), seen.output.view_as(seen.total).to(device)

    def fit(self, site: Site, sums: Sequence[Sums], runs: Sequence[str], *, last: bool) -> None:
        """Re-fit a site; if it is the last of its segment, go on to the next one."""
        module = projection(base_model(self.model), site.gate.module)
        weight = logical_weight(module).detach()
        fitted, held_out = (Moments.of(weight) for _ in range(2))
        passed: list[Seen] = []
        for index, stream in enumerate(self.calls):
            for run, seen in enumerate(self._seen(site, index, runs, stop=not last)):
                total = sums[index][site.gate.module][run] if self.kept is None else None
                inputs, target = self._input_and_target(site, seen, total)
                mask = stream.mask.to(target.device)
                judges = self.targets.held_out[index].to(target.device).unsqueeze(1)  # [B, 1]
                for moments, part in ((held_out, mask & judges), (fitted, mask & ~judges)):
                    moments.add(by_token(inputs, part), by_token(target, part))  # [real tokens, .]
                passed += [seen] if last else []
        self._solve(site, module, fitted.over_processes(), held_out.over_processes())
        if last:
            self._go_on(site, module, passed)

    def _solve(self, site: Site, module: nn.Module, fitted: Moments, held_out: Moments) -> None:
        """One factor for each unit, or all weights, or the one and then the other."""
        by_unit: Solve = partial(rescaled, width=site.gate.width)
        both = ((by_unit, self.rescale), (solve_towards, self.least_squares))
        solves = [solve for solve, wanted in both if wanted]
        try:
            fit_(module, (fitted, held_out), self.ridge, solves)
        except NumericsError as error:
            raise NumericsError(f"{site.gate.module}: {error}") from error

    def _go_on(self, site: Site, module: nn.Module, passed: Sequence[Seen]) -> None:
        """The layer's output with the new weights, from what was seen with the old ones."""
        base = base_model(self.model)
        after = base.get_submodule(site.sum_module) if site.sum_module else nn.Identity()
        for index, seen in enumerate(passed):
            inputs, residual = inputs_and_residual(seen)
            self.hidden[index] = after(residual + module(inputs).view_as(residual))

    def segment(self, runs: Sequence[str], sites: Sequence[Site], changed: Collection[str]) -> None:
        """Re-fit those sites of a segment that are named, and go on to the next segment.

        Args:
            runs: names of its layers, as often as they run.
            sites: all that the pruned network has there.
            changed: output projections of those that are re-fitted.
        """
        there = [site for site in self.targets.sites if site.layer_module in runs]
        sums = self.dense_sums(there, runs)
        here = [site for site in sites if site.gate.module in changed]
        ends = self.kept is None and len(runs) == 1 and here[-1:] == list(sites[-1:])
        ends = ends and bool(here) and _is_end(self, here[-1])
        if here and len(runs) > 1 and self.kept is None:
            self._fit_shared(here, sites[-1], sums, runs)
        else:
            for site in here:
                self.fit(site, sums, runs, last=ends and site is here[-1])
        if not ends:
            self.run(runs)

    def _fit_shared(
        self, here: Sequence[Site], end: Site, sums: Sequence[Sums], runs: Sequence[str]
    ) -> None:
        """Re-fit layers that run several times, again and again; the best of all rounds stays."""
        base = base_model(self.model)
        modules = [projection(base, site.gate.module) for site in here]
        best, least = [copy.deepcopy(m.state_dict()) for m in modules], self._error(end, sums, runs)
        for _ in range(SHARED_ROUNDS):
            for site in here:
                self.fit(site, sums, runs, last=False)
            error = self._error(end, sums, runs)
            if error < least:
                best, least = [copy.deepcopy(m.state_dict()) for m in modules], error
        for module, state in zip(modules, best, strict=True):
            module.load_state_dict(state)

    def _error(self, end: Site, sums: Sequence[Sums], runs: Sequence[str]) -> float:
        """Squared error of a site's last sum on the examples that judge; on all, if none does."""
        total = torch.zeros(2, dtype=torch.float64, device=self.model.device)  # of judges, of all
        for index, stream in enumerate(self.calls):
            *_, seen = self._seen(end, index, runs, stop=True)
            assert seen.total is not None  # noqa: S101  # the layer ran
            mask = stream.mask.to(seen.total.device)
            wrong = seen.total - sums[index][end.gate.module][-1].to(seen.total.device)
            squares = by_token(wrong, mask).double().square().sum(dim=1)
            judges = self.targets.held_out[index].to(mask.device).unsqueeze(1).expand_as(mask)
            total += torch.stack([squares[judges[mask]].sum(), squares.sum()])
        judged, every = sum_over_processes(total).tolist()
        return float(judged or every)


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    targets: DenseTargets,
    *,
    ridge: float = 1e-2,
    changed: Collection[str] | None = None,
    kept: Plan | None = None,
    rescale: bool = False,
    least_squares: bool = True,
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
        kept: the plan by which the model was made from the dense one. Then every narrowed site is
            fitted in parallel, with the inputs that the dense network gives it.
        rescale: fit one factor for each unit first, written into its columns.
        least_squares: fit all weights.

    Returns:
        The names of the sites that were re-fitted, in order.

    Raises:
        NumericsError: when a sum is not finite.
    """
    sites = find_sites(model)
    if changed is None:
        modules = _narrowed(model, targets.dense, all_after=kept is None)
    else:
        modules = {site.gate.module for site in sites if site.name in changed}
    fitted = []
    with in_eval(model, targets.dense):
        there = None if kept is None else kept.sites
        walk = _Walk(model, targets, ridge, there, rescale, least_squares)
        layers, stack = list(by_layer(targets.sites)), ""
        stacks = by_stack(layers)
        for runs in segments(layers, targets.streams[0].order):
            before, stack = stack, runs[0].rpartition(".")[0]
            if before not in ("", stack):
                walk.enter(stacks[stack])
            inside = [site for site in sites if site.layer_module in runs]
            walk.segment(runs, inside, modules)
            fitted += [site.name for site in inside if site.gate.module in modules]
    return fitted


def refit_as_asked(
    model: PreTrainedModel, targets: DenseTargets, stage: Prune, plan: Plan
) -> list[str]:
    """Re-fit, in place, a pruned model as a stage says.

    Args:
        model: after `remove_units`.
        targets: of the model before.
        stage: a structured one.
        plan: by which the model was pruned.

    Returns:
        The names of the sites that were re-fitted, in order; none, where the stage wants no re-fit.
        What the stage ignores is left as it is.
    """
    if not (stage.reconstruct or stage.rescale):
        return []
    parallel = stage.reconstruction == "parallel"
    changed = None
    if stage.ignore:
        modules = _narrowed(model, targets.dense, all_after=not parallel)
        changed = [
            site.name
            for site in find_sites(model)
            if site.gate.module in modules
            and not any(fnmatch.fnmatch(site.name, pattern) for pattern in stage.ignore)
        ]
    return refit(
        model,
        targets,
        ridge=ridge_of(model, stage),
        changed=changed,
        kept=plan if parallel else None,
        rescale=stage.rescale,
        least_squares=stage.reconstruct,
    )


def _narrowed(model: PreTrainedModel, dense: PreTrainedModel, *, all_after: bool) -> set[str]:
    """The output projections that read less than in the dense model, or all from the first on."""
    left = {  # nothing, where all went
        (site.gate.module, site.gate.axis): site.units * site.gate.width
        for site in find_sites(model, ALL_KINDS)
    }
    before = [site.gate for site in find_sites(dense, ALL_KINDS)]
    sizes = [site.units * site.gate.width for site in find_sites(dense, ALL_KINDS)]
    fewer = [
        left.get((gate.module, gate.axis), 0) < size
        for gate, size in zip(before, sizes, strict=True)
    ]
    if all_after and any(fewer):
        return {gate.module for gate in before[fewer.index(True) :]}
    return {gate.module for gate, narrow in zip(before, fewer, strict=True) if narrow}


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

"""The step of one-shot pruning, taken while a model trains: calibrated anew, and re-fitted.

The model without what has gone so far is judged on calibration examples, as `compress` would judge
it. When more goes, the output projections of what is left are re-fitted to what the model computed
just before, and written into the model that trains.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.budget.selection import Selection, selection_of
from hf_prune.criteria import get_criterion, needs
from hf_prune.criteria.ranking import Ranking
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune
from hf_prune.sites import Site, base_model, find_sites, projection
from hf_prune.statistics.batches import Batch, first_examples
from hf_prune.statistics.collect import collect
from hf_prune.statistics.score import score
from hf_prune.surgery.dense import dense_targets
from hf_prune.surgery.reconstruct import refit_as_asked
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.shared import shared_copy, survivors
from hf_prune.targets import Chooser


def narrowed(model: PreTrainedModel, plan: Plan | None) -> PreTrainedModel:
    """A copy of a model that trains, without its hooks and without what a plan removes.

    Without the mixed precision of the Trainer, too: layers that are run one by one know nothing of
    it.
    """
    left = copy.deepcopy(shared_copy(model))
    plain = left.__dict__.pop("_original_forward", None)  # where Accelerate keeps it
    if plain is not None:
        left.__dict__["forward"] = plain
    if plan is not None:
        remove_units(left, plan)
    return left


def _whole(ranking: Ranking | None, kept: Sequence[int], units: int) -> Ranking:
    """A ranking of the units that are left, as one of all units: what has gone costs nothing more.

    Args:
        ranking: of the units that are left; None where there are none.
        kept: their indices.
        units: how many there were.
    """
    place = torch.tensor(kept, dtype=torch.int64)
    gone = torch.tensor(sorted(set(range(units)) - set(kept)), dtype=torch.int64)
    if ranking is None:
        return Ranking(gone, torch.zeros(units + 1, dtype=torch.float64))
    pairs = None
    if ranking.pairs is not None:
        pairs = ranking.pairs.new_zeros(units, units)
        pairs[place.unsqueeze(1), place] = ranking.pairs
    none = torch.zeros(len(gone), dtype=torch.float64)
    order = torch.cat([gone, place[ranking.order]])
    return Ranking(order, torch.cat([none, ranking.errors]), pairs)


def rank_what_is_left(
    left: PreTrainedModel,
    sites: Sequence[Site],
    plan: Plan | None,
    stage: Prune,
    batches: Sequence[Batch],
    seed: int,
) -> dict[str, Ranking]:
    """The order in which units go, those that have gone first.

    Args:
        left: from `narrowed`.
        sites: of the whole model.
        plan: by which units have gone.
        stage: criterion, and how many examples it sees.
        batches: calibration examples.
        seed: of everything random.
    """
    here = find_sites(left, stage.units, stage.ignore)
    few = first_examples(left, batches, stage.calibration_samples)
    wanted = needs(get_criterion(stage.criterion))
    statistics = collect(left, here, few, wanted, seed, stage.projections)
    found = score(left, here, stage.criterion, statistics, seed)
    kept = {} if plan is None else {name: site.kept for name, site in plan.sites.items()}
    return {
        site.name: _whole(found.get(site.name), kept.get(site.name, range(site.units)), site.units)
        for site in sites
    }


def never_more(
    selection: Selection,
    plan: Plan | None,
    rankings: Mapping[str, Ranking],
    chooser: Chooser,
) -> Selection:
    """A selection in which nothing comes back that an earlier plan has removed."""
    if plan is None:
        return selection
    counts = {
        name: min(len(site.kept), len(plan.sites[name].kept))
        for name, site in selection.plan.sites.items()
    }
    if counts == chooser.counts_of(selection):
        return selection
    model_type = selection.plan.model_type
    made = selection_of(chooser.sites, rankings, counts, chooser.goals, model_type=model_type)
    outcomes = tuple(
        dataclasses.replace(before, removed=max(before.removed, after.removed))
        for before, after in zip(selection.outcomes, made.outcomes, strict=True)
    )
    return dataclasses.replace(made, outcomes=outcomes)


def _step(before: Plan | None, after: Plan) -> Plan:
    """The plan that leads from one to the next, in the numbering of what the first one leaves."""
    sites = {}
    for name, site in after.sites.items():
        kept = range(site.units) if before is None else before.sites[name].kept
        if kept:
            places = {unit: place for place, unit in enumerate(kept)}
            left = tuple(places[unit] for unit in site.kept)
            sites[name] = SitePlan(site.kind, len(kept), left)
    return Plan(after.model_type, sites)


@torch.no_grad()
def refit_into_(
    model: PreTrainedModel,
    left: PreTrainedModel,
    before: Plan | None,
    after: Plan,
    stage: Prune,
    batches: Sequence[Batch],
) -> list[str]:
    """Re-fit what stays when more goes, inside the whole model that trains.

    Args:
        model: of which all units are there; the columns of units that stay are changed in place.
        left: from `narrowed`, by the plan before.
        before: the plan so far.
        after: the plan from now on, which keeps no more.
        stage: how to re-fit.
        batches: calibration examples.

    Returns:
        The sites that were re-fitted.
    """
    examples = stage.reconstruction_samples or stage.calibration_samples
    targets = dense_targets(left, first_examples(left, batches, examples))
    small = copy.deepcopy(left)
    step = _step(before, after)
    remove_units(small, step)
    fitted = refit_as_asked(small, targets, stage, step)
    base, paths = base_model(small), {id(m): name for name, m in small.named_modules()}
    modules = {s.gate.module: projection(base, s.gate.module) for s in find_sites(small)}
    names = [
        f"{paths[id(module)]}.{name}"
        for module in modules.values()
        for name, _ in module.named_parameters(recurse=False)
    ]
    for name, positions in survivors(model, after, names).items():
        _write(model.get_parameter(name), positions, small.get_parameter(name))
    return fitted


def _write(whole: nn.Parameter, positions: Tensor, values: Tensor) -> None:
    """Put values at their positions in a parameter, which stays the same object."""
    flat = whole.data.flatten()
    flat[positions.flatten()] = values.detach().to(flat).flatten()
    whole.data.copy_(flat.view_as(whole))

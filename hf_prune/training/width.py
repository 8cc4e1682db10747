"""The gate of the hidden width beside learned masks: a number for each channel of the residuals.

Everything in the layers and the embeddings grows with the width, so what is left of a cost is, to
first order, the share of channels that stay times the share of units that stay. When the gates
settle, the goals are set anew on a model that has the width that was learned: they are met exactly.

Source: Xia et al. 2022, arXiv:2204.00408, who gate the same channels in all layers.
"""

import dataclasses

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.budget.costs import unit_cost
from hf_prune.budget.levels import levels_of
from hf_prune.budget.selection import Outcome, Selection
from hf_prune.errors import UnsupportedModelError
from hf_prune.measure.counts import count_parameters
from hf_prune.measure.latency_table import shaped_like
from hf_prune.measure.lengths import site_lengths
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune
from hf_prune.sites import (
    EXPERT_KINDS,
    HIDDEN,
    Site,
    find_module,
    find_sites,
    logical_weight,
    readers,
)
from hf_prune.targets import Chooser


def width_site(model: PreTrainedModel) -> Site:
    """The site of the hidden width, where it can have a gate that learns.

    Raises:
        UnsupportedModelError: for mixtures of experts, and where parts have other widths.
    """
    if find_sites(model, EXPERT_KINDS):
        raise UnsupportedModelError(
            "a gate of the hidden width cannot be written into the weights of experts: leave "
            "hidden out of coarse."
        )
    (site,) = find_sites(model, [HIDDEN])
    return site


def width_plan(site: Site, stage: Prune, opened: Tensor) -> SitePlan:
    """The channels that stay: the likeliest ones, as many as are expected to be open.

    Args:
        site: from `width_site`.
        stage: `round_to`.
        opened: `[E]`, the probability of each channel's gate to be open.
    """
    expected = float(opened.sum())
    count = min(levels_of(site, 1, stage.round_to), key=lambda level: abs(level - expected))
    best = opened.argsort(descending=True, stable=True)[:count]
    return SitePlan(HIDDEN, site.units, tuple(sorted(best.tolist())))


@torch.no_grad()
def fold_width_(model: PreTrainedModel, site: Site, values: Tensor) -> None:
    """Write what each channel's gate lets through into the columns of all that reads it.

    A head that shares its weight with the embeddings stays as it is, as its gate does.

    Args:
        model: changed in place.
        site: from `width_site`.
        values: `[E]`.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name in readers(site):
        module = find_module(model, name)
        if id(module.weight) not in tables:
            logical_weight(module).mul_(values)  # [out, E]


def counts_left(model: PreTrainedModel, stage: Prune, selection: Selection) -> tuple[int, int]:
    """Parameters of the model, and MACs of one sequence in its units, once a selection is removed.

    Args:
        model: not changed.
        stage: units, and the length of the sequence.
        selection: of units and channels.
    """
    counts = {name: len(site.kept) for name, site in selection.plan.sites.items()}
    left = shaped_like(model, counts)
    sites = find_sites(left, stage.units, stage.ignore)
    seen = site_lengths(left, sites, stage.sequence_length)
    macs = sum(site.units * unit_cost(site, "macs", seen) for site in sites)
    return count_parameters(left), macs


def narrowed_chooser(model: PreTrainedModel, stage: Prune, width: int, first: Chooser) -> Chooser:
    """What chooses units where so many channels are left, within the same limits.

    Args:
        model: not changed, all gates open.
        stage: units, and what is asked for.
        width: channels that stay.
        first: made before any channel was closed.
    """
    narrow = shaped_like(model, {HIDDEN: width})
    sites = find_sites(narrow, stage.units, stage.ignore)
    chooser = Chooser(narrow, sites, {}, stage)
    chooser.goals = [
        dataclasses.replace(goal, asked=max(0, goal.total - (before.total - before.asked)))
        for goal, before in zip(chooser.goals, first.goals, strict=True)
    ]
    return chooser


def with_width(selection: Selection, plan: SitePlan, first: Chooser) -> Selection:
    """A selection of units where channels were left out, as one of the whole model.

    Args:
        selection: from `narrowed_chooser`.
        plan: of the channels.
        first: made before any channel was closed.
    """
    outcomes = tuple(
        Outcome(
            found.cost,
            goal.asked,
            goal.total - (found.total - found.removed),
            goal.total,
            found.tolerance,
        )
        for found, goal in zip(selection.outcomes, first.goals, strict=True)
    )
    both = Plan(selection.plan.model_type, {**selection.plan.sites, HIDDEN: plan})
    return dataclasses.replace(selection, plan=both, outcomes=outcomes)

"""Solvers: which units stay within a budget.

Every solver here is an order in which units are taken, best first. `select` takes the floors, then
as much of the order as fits, and stops at the first unit that does not. So a budget is never
exceeded, and a larger one keeps a superset.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.budget.costs import unit_cost
from hf_prune.errors import ConfigError
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune, count_to_remove, did_you_mean
from hf_prune.sites import Site

Priority = Callable[[Tensor, int], Tensor]
"""From the scores `[U]` of a site and the cost of one unit to `[U]`, higher = taken earlier."""


def ranks(scores: Tensor) -> Tensor:
    """Rank of each unit, 0 = best; equal scores in the order of their indices."""
    order = torch.argsort(scores, descending=True, stable=True)
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order))
    return result


def uniform(scores: Tensor, cost: int) -> Tensor:
    """The same fraction of every site: units are taken by their relative rank."""
    return -(ranks(scores).double() + 1) / len(scores)


def global_(scores: Tensor, cost: int) -> Tensor:
    """One ranking over the whole model, by score per cost."""
    return scores.double() / cost


SOLVERS: dict[str, Priority] = {"uniform": uniform, "global": global_}
"""Every solver, by the name that recipes use."""


def get_solver(name: str) -> Priority:
    """The solver of a name.

    Raises:
        ConfigError: with the closest name, and all the names there are.
    """
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver {name!r}{did_you_mean(name, sorted(SOLVERS))}")
    return SOLVERS[name]


@dataclass(frozen=True)
class Selection:
    """A plan, what it was asked to remove, and what it removes, in the same unit of cost."""

    plan: Plan
    cost: str
    asked: int
    removed: int
    total: int

    @property
    def met(self) -> bool:
        """Whether at least what was asked is removed."""
        return self.removed >= self.asked

    def to_dict(self) -> dict[str, object]:
        """For the report."""
        return {
            "cost": self.cost,
            "total": self.total,
            "asked_to_remove": self.asked,
            "removed": self.removed,
            "met": self.met,
            "sparsity": self.removed / self.total if self.total else 0.0,
        }


def _fit(priority: Tensor, cost: Tensor, floor: Tensor, budget: int) -> Tensor:
    """Mask of the units taken: floors always, then the order up to the first that does not fit."""
    order = torch.argsort(priority, descending=True, stable=True)
    order = torch.cat([order[floor[order]], order[~floor[order]]])
    spent = torch.cumsum(cost[order], dim=0)
    taken = (spent <= budget) | floor[order]
    taken = torch.cumprod(taken.long(), dim=0).bool()
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[taken]] = True
    return mask


def select(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    costs: Mapping[str, int],
    *,
    solver: str,
    budget: int,
    floors: Mapping[str, int],
) -> dict[str, SitePlan]:
    """The units that stay.

    Args:
        sites: from `find_sites`.
        scores: for each site `[U]`, higher = keep.
        costs: for each site, what one of its units costs.
        solver: a key of `SOLVERS`.
        budget: what all kept units may cost together.
        floors: by kind, how many units every site keeps whatever the budget (1 where not given).

    Returns:
        For each site the sorted indices that stay. Their cost is at most `budget`, unless the
        floors alone exceed it.
    """
    rank = get_solver(solver)
    if not sites:
        return {}
    priority = torch.cat([rank(scores[site.name], costs[site.name]) for site in sites])
    cost = torch.cat([torch.full((site.units,), costs[site.name]) for site in sites])
    floor = torch.cat([ranks(scores[site.name]) < floors.get(site.kind, 1) for site in sites])
    kept = _fit(priority, cost, floor, budget).split([site.units for site in sites])
    return {
        site.name: SitePlan(site.kind, site.units, tuple(part.nonzero().flatten().tolist()))
        for site, part in zip(sites, kept, strict=True)
    }


def decide(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    stage: Prune,
    *,
    model_type: str,
    base: int | None = None,
) -> Selection:
    """The plan that removes at least `stage.sparsity` of `base`.

    Args:
        sites: from `find_sites`.
        scores: for each site `[U]`, higher = keep.
        stage: solver, cost, sparsity and floors.
        model_type: of the model, for the plan.
        base: what the sparsity is a fraction of, in the unit of `stage.cost`; the cost of all units
            of all sites, if not given.
    """
    costs = {site.name: unit_cost(site, stage.cost, stage.sequence_length) for site in sites}
    prunable = sum(site.units * costs[site.name] for site in sites)
    total = prunable if base is None else base
    asked = count_to_remove(stage.sparsity, total)
    floors = {"heads": stage.min_heads, "neurons": stage.min_neurons}
    budget = prunable - asked
    kept = select(sites, scores, costs, solver=stage.solver, budget=budget, floors=floors)
    removed = sum(len(kept[site.name].removed) * costs[site.name] for site in sites)
    return Selection(Plan(model_type, kept), stage.cost, asked, removed, total)

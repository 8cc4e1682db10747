"""The multiple-choice knapsack: one level for each site, least error within a budget, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_POINTS = 1 << 13
"""Partial solutions kept at once. Where there are more, the best of each slice of cost stays."""


@dataclass(frozen=True)
class Cut:
    """What tells partial solutions that cannot end better than one that is known.

    Whatever completes a partial solution within the budget, its error is at least the least of
    `error + price * (cost - budget)`, site by site.

    Attributes:
        price: of a unit of cost, in units of error.
        most: partial solutions whose bound is above this error are dropped.
    """

    price: float
    most: float


def _dominant(cost: Tensor, error: Tensor) -> Tensor:
    """Which of some points no other beats in both cost and error, by increasing cost."""
    order = torch.argsort(cost, stable=True)
    least = error[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = error[order][1:] < least[:-1]
    order = order[better]
    last = torch.ones(len(order), dtype=torch.bool)  # of several that cost the same
    last[:-1] = cost[order][1:] != cost[order][:-1]
    return order[last]


def _thin(cost: Tensor, limit: int) -> Tensor:
    """The cheapest point, and of each of `limit - 1` equal slices of cost the last one."""
    span = int(cost[-1] - cost[0]) + 1
    piece = ((cost - cost[0]).double() * (limit - 1) / span).long()
    last = torch.ones(len(cost), dtype=torch.bool)
    last[:-1] = piece[1:] != piece[:-1]
    last[0] = True
    return last.nonzero().flatten()


def merge(
    costs: Sequence[Tensor],
    errors: Sequence[Tensor],
    budget: int,
    limits: Sequence[int],
    cut: Cut | None = None,
) -> tuple[list[int], bool] | None:
    """The levels with the least total error within a budget, and whether that is proved.

    Args:
        costs: for each site `[levels]` int64.
        errors: for each site `[levels]`, what is lost at each level.
        budget: what all chosen levels may cost together.
        limits: for each site, the partial solutions that are kept once it is merged.
        cut: drops those that cannot end well; it changes no result that is proved.

    Returns:
        For each site the index of its level, no site at all where everything was cut; and whether
        no partial solution was left out for want of room. None when even the cheapest levels exceed
        the budget.
    """
    cheapest = [int(cost.min()) for cost in costs]
    rest, proved = sum(cheapest), True
    if rest > budget:
        return None
    bounds = [
        float((loss + cut.price * cost).min()) if cut else 0.0
        for cost, loss in zip(costs, errors, strict=True)
    ]
    bound = sum(bounds)
    total, error = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trace: list[tuple[Tensor, Tensor]] = []
    for index, (cost, loss) in enumerate(zip(costs, errors, strict=True)):
        rest -= cheapest[index]
        bound -= bounds[index]
        all_costs = (total.unsqueeze(1) + cost.long()).flatten()  # [points * levels]
        all_errors = (error.unsqueeze(1) + loss.double()).flatten()
        fitting = all_costs <= budget - rest
        if cut is not None:
            fitting &= all_errors + cut.price * (all_costs - budget) <= cut.most - bound
        fits = fitting.nonzero().flatten()
        chosen = fits[_dominant(all_costs[fits], all_errors[fits])]
        if not len(chosen):
            return [], proved
        if len(chosen) > limits[index]:
            proved = False
            chosen = chosen[_thin(all_costs[chosen], limits[index])]
        total, error = all_costs[chosen], all_errors[chosen]
        trace.append((chosen // len(cost), chosen % len(cost)))
    point, levels = int(error.argmin()), []
    for parent, level in reversed(trace):
        levels.append(int(level[point]))
        point = int(parent[point])
    return levels[::-1], proved


def knapsack(
    costs: Sequence[Tensor], errors: Sequence[Tensor], budget: int, max_points: int = MAX_POINTS
) -> list[int] | None:
    """The level of each site with the least total error, within a budget.

    Args:
        costs: for each site `[levels]` int64.
        errors: for each site `[levels]`, what is lost at each level.
        budget: what all chosen levels may cost together.
        max_points: partial solutions kept at once.

    Returns:
        For each site the index of its level; None when even the cheapest ones exceed the budget.
        The budget is never exceeded. The error is the least possible as long as there are no more
        than `max_points` undominated partial solutions; with more, costs still add up exactly, and
        the error is close to the least.

    Source: dynamic programming over undominated states, Nemhauser and Ullmann 1969.
    """
    found = merge(costs, errors, budget, [max_points] * len(costs))
    return None if found is None else found[0]

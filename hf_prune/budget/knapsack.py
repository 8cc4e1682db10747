"""The multiple-choice knapsack: one level for each site, least error within a budget, exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_POINTS = 1 << 13
"""Partial solutions kept at once. Where there are more, the best of each slice of cost stays."""


def _dominant(cost: Tensor, error: Tensor) -> Tensor:
    """Which of some points no other beats in both cost and error, by increasing cost."""
    by_error = torch.argsort(error, stable=True)
    order = by_error[torch.argsort(cost[by_error], stable=True)]
    least = error[order].cummin(0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = error[order][1:] < least[:-1]
    return order[first]


def _thin(cost: Tensor, limit: int) -> Tensor:
    """The cheapest point, and of each of `limit - 1` equal slices of cost the last one."""
    span = int(cost[-1] - cost[0]) + 1
    piece = ((cost - cost[0]).double() * (limit - 1) / span).long()
    last = torch.ones(len(cost), dtype=torch.bool)
    last[:-1] = piece[1:] != piece[:-1]
    last[0] = True
    return last.nonzero().flatten()


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
    cheapest = [int(cost.min()) for cost in costs]
    rest = sum(cheapest)
    if rest > budget:
        return None
    total, error = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trace: list[tuple[Tensor, Tensor]] = []
    for index, (cost, loss) in enumerate(zip(costs, errors, strict=True)):
        rest -= cheapest[index]
        all_costs = (total.unsqueeze(1) + cost.long()).flatten()  # [points * levels]
        all_errors = (error.unsqueeze(1) + loss.double()).flatten()
        fits = (all_costs <= budget - rest).nonzero().flatten()
        chosen = fits[_dominant(all_costs[fits], all_errors[fits])]
        if len(chosen) > max_points:
            chosen = chosen[_thin(all_costs[chosen], max_points)]
        total, error = all_costs[chosen], all_errors[chosen]
        trace.append((chosen // len(cost), chosen % len(cost)))
    point, levels = int(error.argmin()), []
    for parent, level in reversed(trace):
        levels.append(int(level[point]))
        point = int(parent[point])
    return levels[::-1]

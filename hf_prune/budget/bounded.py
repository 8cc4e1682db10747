"""The same knapsack where sites have very many levels: bounds leave few of them to choose from.

A price of cost turns the budget into a part of the error, and each site can then choose alone. What
all of them pay together, less the price of the budget, is a lower bound of the least error; levels
that raise it above the error of a solution that is known cannot be of a better one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.budget.knapsack import Cut, merge

ROUNDS = 100
"""Halvings of the range of the price."""
MAX_ENTRIES = 1 << 19
"""Partial solutions times levels of the next site."""
GUESSES = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
"""Of the gap between the bound and what is known, where the least error is looked for."""
ROUNDING = 1e-12
"""Of all errors together, by which sums of them may be wrong."""


@dataclass(frozen=True)
class Relaxed:
    """What sites choose alone at a price.

    Attributes:
        price: of a unit of cost, in units of error: the one with the largest bound.
        levels: for each site the index of its level; within the budget.
        bound: no levels within the budget have a smaller total error.
        slack: by which sums of errors may be wrong.
    """

    price: float
    levels: list[int]
    bound: float
    slack: float


def _padded(values: Sequence[Tensor], fill: float) -> Tensor:
    rows = [value.double() for value in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def relax(costs: Sequence[Tensor], errors: Sequence[Tensor], budget: int) -> Relaxed:
    """What sites choose alone at the least price at which they keep within a budget.

    Args:
        costs: for each site `[levels]` int64; the cheapest ones together within the budget.
        errors: for each site `[levels]`, what is lost at each level.
        budget: what all chosen levels may cost together.
    """
    cost, error = _padded(costs, 0.0), _padded(errors, torch.inf)  # [sites, levels]
    scale = sum(float(e.abs().max()) for e in errors)

    def chosen(price: float) -> tuple[list[int], int]:
        levels = (error + price * cost).argmin(1).tolist()
        return levels, sum(int(c[at]) for c, at in zip(costs, levels, strict=True))

    low, high = 0.0, 0.0
    if chosen(0.0)[1] > budget:
        high = max(scale, 1e-300) / max(budget, 1) * 1e-6
        while chosen(high)[1] > budget:
            low, high = high, 4 * high
    for _ in range(ROUNDS if high else 0):
        middle = (low + high) / 2
        if chosen(middle)[1] > budget:
            low = middle
        else:
            high = middle
    bound = float((error + high * cost).amin(1).sum()) - high * budget
    return Relaxed(high, chosen(high)[0], bound, ROUNDING * scale)


def _within(
    costs: Sequence[Tensor],
    errors: Sequence[Tensor],
    budget: int,
    relaxed: Relaxed,
    most: float,
) -> tuple[list[int], bool]:
    """The levels with the least total error, if that is at most `most`, and whether it is proved.

    No levels where there are none; perhaps others where it is more.
    """
    kept = []
    for cost, error in zip(costs, errors, strict=True):
        paid = error.double() + relaxed.price * cost
        kept.append((relaxed.bound + paid - paid.min() <= most).nonzero().flatten())
    sizes = [len(levels) for levels in kept]
    found = merge(
        [cost[levels] for cost, levels in zip(costs, kept, strict=True)],
        [error[levels] for error, levels in zip(errors, kept, strict=True)],
        budget,
        [max(1, MAX_ENTRIES // size) for size in (*sizes[1:], 1)],
        Cut(relaxed.price, most),
    )
    if found is None:
        return [], True
    levels, proved = found
    return [int(kept[site][at]) for site, at in enumerate(levels)], proved


def bounded_knapsack(
    costs: Sequence[Tensor],
    errors: Sequence[Tensor],
    budget: int,
    relaxed: Relaxed,
    known: Sequence[int],
) -> tuple[list[int], bool]:
    """The level of each site with the least total error within a budget, and whether it is proved.

    The error is guessed close to the bound first, since a small guess leaves little to merge.

    Args:
        costs: for each site `[levels]` int64.
        errors: for each site `[levels]`, what is lost at each level.
        budget: what all chosen levels may cost together.
        relaxed: from `relax`.
        known: for each site the index of a level; within the budget.

    Returns:
        For each site the index of its level, never worse than what is known.

    Source: reduction by Lagrangian bounds before and in dynamic programming, as for the
        multiple-choice knapsack in Pisinger 1995; the guesses are ours.
    """

    def lost(levels: Sequence[int]) -> float:
        return sum(float(e[at]) for e, at in zip(errors, levels, strict=True))

    best = list(known)
    gap = lost(best) - relaxed.bound
    for share in GUESSES if gap > relaxed.slack else ():
        most = min(relaxed.bound + share * gap, lost(best)) + relaxed.slack
        found, proved = _within(costs, errors, budget, relaxed, most)
        if found and lost(found) < lost(best):
            best = found
        if not proved or lost(best) <= most:
            return best, proved
    return best, True

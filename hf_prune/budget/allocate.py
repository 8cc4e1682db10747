"""How many units of each site stay: one solver, within one goal or within several at once."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.budget.costs import Goal
from hf_prune.budget.levels import Counts, Levels
from hf_prune.budget.solvers import Problem, Solver, get_solver
from hf_prune.criteria.ranking import Ranking
from hf_prune.sites import Site

SURROGATE_BUDGET = 1 << 40
"""The budget of several goals taken together, in units of its own."""
SMALLEST_SHARE = 1e-3
"""Of a budget, as which less is taken when weights are adjusted."""
LARGEST_SHARE = 1 << 16
"""Of a budget: what costs more fits no better, and sums of it stay below 2^63."""
SURROGATE_ROUNDS = 24
"""How often the weights of several goals are adjusted."""
EXCHANGES = 20
"""How often all pairs of sites are gone through, at most."""


def _tables(goal: Goal) -> dict[str, Tensor]:
    return {name: torch.tensor(table) for name, table in goal.tables.items()}


def _weighted(goals: Sequence[Goal], weights: Sequence[float]) -> dict[str, Tensor]:
    """One table in the place of several: the weighted mean of their shares of their budgets."""
    result = {}
    for name in goals[0].tables:
        share = sum(
            weight * torch.tensor(goal.tables[name], dtype=torch.float64) / max(goal.budget, 1)
            for goal, weight in zip(goals, weights, strict=True)
        )
        assert isinstance(share, Tensor)  # noqa: S101  # there is at least one goal
        result[name] = (share.clamp(max=LARGEST_SHARE) * SURROGATE_BUDGET).ceil().long()
    return result


def _largest(goals: Sequence[Goal]) -> dict[str, Tensor]:
    """One table that is never less than any: what meets it meets all."""
    each = [_weighted([goal], [1.0]) for goal in goals]
    return {name: torch.stack([t[name] for t in each]).amax(dim=0) for name in each[0]}


def _solve_several(problem: Problem, goals: Sequence[Goal], solver: Solver) -> Counts:
    """Within all goals at once: weights move towards the goal that is exceeded most."""
    least = {site.name: int(problem.levels(site)[0]) for site in problem.sites}
    if any(goal.spent(least) > goal.budget for goal in goals):
        return least

    def attempt(tables: dict[str, Tensor]) -> Counts:
        return solver(dataclasses.replace(problem, tables=tables, budget=SURROGATE_BUDGET))

    found = [attempt(_largest(goals))]
    weights = [1 / len(goals)] * len(goals)
    for _ in range(SURROGATE_ROUNDS):
        counts = attempt(_weighted(goals, weights))
        shares = [goal.spent(counts) / max(goal.budget, 1) for goal in goals]
        if max(shares) <= 1:
            found.append(counts)
        floored = [max(share, SMALLEST_SHARE) for share in shares]  # all units may be gone
        weights = [weight * share**2 for weight, share in zip(weights, floored, strict=True)]
        weights = [weight / sum(weights) for weight in weights]
    best = min(found, key=lambda counts: total_error(problem.sites, problem.rankings, counts))
    met = all(goal.spent(best) <= goal.budget for goal in goals)
    return _exchanged(problem, goals, best) if met and solver is get_solver("knapsack") else best


def _best_pair(
    errors: tuple[Tensor, Tensor], costs: Sequence[tuple[Tensor, Tensor]], room: Sequence[int]
) -> tuple[int, int, float]:
    """The levels of two sites with the least error within what the other sites leave, and it.

    Costs never fall with the level, so what fits beside a level of one site are the first levels of
    the other.

    Args:
        errors: of both sites, `[levels]` each.
        costs: by goal, those of both sites, `[levels]` each.
        room: by goal, what both may cost together; some levels do.
    """
    one, two = errors
    fitting = torch.full((len(one),), len(two))  # for each level of one, how many of two fit
    for (first, second), left in zip(costs, room, strict=True):
        fitting = torch.minimum(fitting, torch.searchsorted(second, left - first, right=True))
    least = two.cummin(0).values
    total = one + least[(fitting - 1).clamp(min=0)]
    total = total.masked_fill(fitting == 0, torch.inf)
    at = int(total.argmin())
    other = int(two[: int(fitting[at])].argmin())
    return at, other, float(total[at])


def _exchanged(problem: Problem, goals: Sequence[Goal], counts: Counts) -> Counts:
    """Better levels for two sites at a time, all others as they are, until no pair is left.

    Args:
        problem: sites, rankings and levels.
        goals: met by `counts`, and by the result.
        counts: where to start.
    """
    names = [site.name for site in problem.sites]
    levels = {site.name: problem.levels(site).tolist() for site in problem.sites}
    errors = {
        name: torch.tensor(
            [problem.rankings[name].error_of(level) for level in levels[name]], dtype=torch.float64
        )
        for name in names
    }
    costs = {
        name: [torch.tensor([goal.tables[name][level] for level in levels[name]]) for goal in goals]
        for name in names
    }
    found, pairs = dict(counts), list(itertools.combinations(names, 2))
    for _ in range(EXCHANGES):
        before = dict(found)
        for one, two in pairs:
            own = [goal.tables[one][found[one]] + goal.tables[two][found[two]] for goal in goals]
            room = [
                goal.budget - goal.spent(found) + cost
                for goal, cost in zip(goals, own, strict=True)
            ]
            both = list(zip(costs[one], costs[two], strict=True))
            first, second, error = _best_pair((errors[one], errors[two]), both, room)
            now = [problem.rankings[name].error_of(found[name]) for name in (one, two)]
            if error < sum(now):
                found[one], found[two] = levels[one][first], levels[two][second]
        if found == before:
            break
    return found


def total_error(
    sites: Sequence[Site], rankings: Mapping[str, Ranking], counts: Mapping[str, int]
) -> float:
    """What is lost in all sites together, in the unit of the criterion."""
    return sum(rankings[site.name].error_of(counts[site.name]) for site in sites)


def allocate(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    goals: Sequence[Goal],
    *,
    solver: str,
    levels: Levels,
) -> Counts:
    """How many units of each site stay.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        goals: all of them are met, unless the floors alone exceed one.
        solver: a key of `SOLVERS`.
        levels: by site, the counts of units that it can keep.
    """
    solve = get_solver(solver)
    if not sites:
        return {}
    problem = Problem(sites, rankings, _tables(goals[0]), goals[0].budget, levels)
    if len(goals) == 1:
        return solve(problem)
    return _solve_several(problem, goals, solve)

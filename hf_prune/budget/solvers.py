"""Solvers: how many units of each site stay, within a budget.

A site can be kept at some widths, its levels: at least a floor, in multiples of `round_to`, or
whole. Some solvers follow one order of all steps from level to level, and stop at the first that
does not fit: then a larger budget keeps a superset. `knapsack` chooses the levels together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_prune.budget.costs import Goal
from hf_prune.budget.knapsack import knapsack
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune, did_you_mean
from hf_prune.sites import Site

MAX_LEVELS = 128
"""Levels of one site that the knapsack chooses from."""
SURROGATE_BUDGET = 1 << 40
"""The budget of several goals taken together, in units of its own."""
SURROGATE_ROUNDS = 24
"""How often the weights of several goals are adjusted."""


def levels_of(site: Site, floor: int, step: int) -> list[int]:
    """The counts of units that a site can keep: from a floor on, in steps, or all of them."""
    floor = min(site.units, floor)
    first = min(site.units, -(-floor // step) * step)
    return [*range(first, site.units, step), site.units]


@dataclass(frozen=True)
class Problem:
    """What a solver is given.

    Attributes:
        sites: from `find_sites`.
        rankings: in which order the units of each site go, and what is lost.
        tables: by site `[U + 1]` int64, what keeping `k` units costs.
        budget: what all kept units may cost together.
        floors: by kind, how many units every site keeps (1 where not given).
        round_to: by kind, of which number the kept units are a multiple (1 where not given), unless
            all of them stay.
    """

    sites: Sequence[Site]
    rankings: Mapping[str, Ranking]
    tables: Mapping[str, Tensor]
    budget: int
    floors: Mapping[str, int] = field(default_factory=dict)
    round_to: Mapping[str, int] = field(default_factory=dict)

    def levels(self, site: Site) -> Tensor:
        """The counts of units that the site can keep, increasing."""
        floor, step = self.floors.get(site.kind, 1), self.round_to.get(site.kind, 1)
        return torch.tensor(levels_of(site, floor, step))

    def errors(self, site: Site, levels: Tensor) -> Tensor:
        """What is lost at each level, `[levels]`."""
        return self.rankings[site.name].errors[site.units - levels]


Counts = dict[str, int]
"""By site, how many of its units stay."""
Priority = Callable[[Problem, Site, Tensor], Tensor]
"""How early each step to a level but the first is taken, `[levels - 1]`, higher = earlier."""


def _uniform(problem: Problem, site: Site, levels: Tensor) -> Tensor:
    return -levels[1:].double() / site.units


def _global(problem: Problem, site: Site, levels: Tensor) -> Tensor:
    gain = -problem.errors(site, levels).diff()
    cost = problem.tables[site.name][levels].diff().clamp(min=1)
    return (gain / cost).cummin(0).values  # a step never comes before the one that it builds on


def _top_down(problem: Problem, site: Site, levels: Tensor) -> Tensor:
    return -(site.layer + 0.5 * levels[1:].double() / site.units)


def _in_order(problem: Problem, priority: Priority, start: Counts | None = None) -> Counts:
    """Follow the order of all steps, and stop at the first one that does not fit.

    From the least levels, or from those of `start`.
    """
    levels = {site.name: problem.levels(site) for site in problem.sites}
    if start is not None:
        levels = {name: level[level >= start[name]] for name, level in levels.items()}
    counts = {name: int(level[0]) for name, level in levels.items()}
    spent = sum(int(problem.tables[name][count]) for name, count in counts.items())
    keys = [priority(problem, site, levels[site.name]) for site in problem.sites]
    if not any(len(key) for key in keys):
        return counts
    steps = [problem.tables[s.name][levels[s.name]].diff() for s in problem.sites]
    owner = torch.cat([torch.full((len(k),), i) for i, k in enumerate(keys)])
    order = torch.argsort(torch.cat(keys), descending=True, stable=True)
    fits = spent + torch.cat(steps)[order].cumsum(0) <= problem.budget
    taken = owner[order[fits.long().cumprod(0).bool()]]
    for index, site in enumerate(problem.sites):
        counts[site.name] = int(levels[site.name][int((taken == index).sum())])
    return counts


def uniform(problem: Problem) -> Counts:
    """The same fraction of every site."""
    return _in_order(problem, _uniform)


def global_(problem: Problem) -> Counts:
    """One order over the whole model, by what a step saves per cost."""
    return _in_order(problem, _global)


def top_down(problem: Problem) -> Counts:
    """Layer by layer from the top, each down to its floor, until the budget is met."""
    return _in_order(problem, _top_down)


def _thinned(levels: Tensor) -> Tensor:
    """At most about `MAX_LEVELS` of some levels, the first and the last among them."""
    step = -(-len(levels) // MAX_LEVELS)
    return torch.cat([levels[:-1:step], levels[-1:]])


def exact(problem: Problem) -> Counts:
    """The levels with the least total error within the budget.

    Of a site with very many levels every few are tried; what is then left of the budget goes, step
    by step, where it saves most.
    """
    levels = [_thinned(problem.levels(site)) for site in problem.sites]
    costs = [problem.tables[s.name][x] for s, x in zip(problem.sites, levels, strict=True)]
    errors = [problem.errors(s, x) for s, x in zip(problem.sites, levels, strict=True)]
    chosen = knapsack(costs, errors, problem.budget)
    if chosen is None:  # the floors alone exceed it: keep no more than them
        chosen = [0] * len(levels)
    pairs = zip(problem.sites, levels, chosen, strict=True)
    counts = {site.name: int(level[index]) for site, level, index in pairs}
    if any(len(problem.levels(s)) > len(x) for s, x in zip(problem.sites, levels, strict=True)):
        return _in_order(problem, _global, counts)
    return counts


Solver = Callable[[Problem], Counts]

SOLVERS: dict[str, Solver] = {
    "global": global_,
    "knapsack": exact,
    "top_down": top_down,
    "uniform": uniform,
}
"""Every solver, by the name that recipes use."""


def get_solver(name: str) -> Solver:
    """The solver of a name.

    Raises:
        ConfigError: with the closest name, and all the names there are.
    """
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver {name!r}{did_you_mean(name, sorted(SOLVERS))}")
    return SOLVERS[name]


@dataclass(frozen=True)
class Outcome:
    """What one goal asked for, and what is removed, in the same unit of cost.

    `tolerance` is for what is measured and therefore noisy: the share of what may be left by which
    it may be exceeded.
    """

    cost: str
    asked: int
    removed: int
    total: int
    tolerance: float = 0.0

    @property
    def met(self) -> bool:
        """Whether at least what was asked is removed."""
        return self.removed >= self.asked - self.tolerance * (self.total - self.asked)

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


@dataclass(frozen=True)
class Selection:
    """A plan, and for each goal what it asked for and what the plan removes."""

    plan: Plan
    outcomes: tuple[Outcome, ...]
    error: float

    @property
    def met(self) -> bool:
        """Whether every goal is met."""
        return all(outcome.met for outcome in self.outcomes)

    def to_dict(self) -> dict[str, object]:
        """For the report: the first goal, and all of them under `goals` where there are more."""
        result = {**self.outcomes[0].to_dict(), "met": self.met, "error": self.error}
        if len(self.outcomes) > 1:
            result["goals"] = [outcome.to_dict() for outcome in self.outcomes]
        return result


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
        result[name] = (share * SURROGATE_BUDGET).ceil().long()
    return result


def _largest(goals: Sequence[Goal]) -> dict[str, Tensor]:
    """One table that is never less than any: what meets it meets all."""
    each = [_weighted([goal], [1.0]) for goal in goals]
    return {name: torch.stack([t[name] for t in each]).amax(dim=0) for name in each[0]}


def _solve_several(problem: Problem, goals: Sequence[Goal], solver: Solver) -> Counts:
    """Within all goals at once: weights move towards the goal that is exceeded most."""

    def attempt(tables: dict[str, Tensor]) -> Counts:
        return solver(
            Problem(
                problem.sites,
                problem.rankings,
                tables,
                SURROGATE_BUDGET,
                problem.floors,
                problem.round_to,
            )
        )

    found = [attempt(_largest(goals))]
    weights = [1 / len(goals)] * len(goals)
    for _ in range(SURROGATE_ROUNDS):
        counts = attempt(_weighted(goals, weights))
        shares = [goal.spent(counts) / max(goal.budget, 1) for goal in goals]
        if max(shares) <= 1:
            found.append(counts)
        weights = [weight * share**2 for weight, share in zip(weights, shares, strict=True)]
        weights = [weight / sum(weights) for weight in weights]
    return min(found, key=lambda counts: total_error(problem.sites, problem.rankings, counts))


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
    floors: Mapping[str, int],
    round_to: Mapping[str, int],
) -> Counts:
    """How many units of each site stay.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        goals: all of them are met, unless the floors alone exceed one.
        solver: a key of `SOLVERS`.
        floors: by kind, how many units every site keeps.
        round_to: by kind, of which number the kept units are a multiple.
    """
    solve = get_solver(solver)
    if not sites:
        return {}
    problem = Problem(sites, rankings, _tables(goals[0]), goals[0].budget, floors, round_to)
    if len(goals) == 1:
        return solve(problem)
    return _solve_several(problem, goals, solve)


def floors_of(stage: Prune) -> dict[str, int]:
    """By kind, how many units every site keeps."""
    return {"heads": stage.min_heads, "neurons": stage.min_neurons}


def steps_of(stage: Prune) -> dict[str, int]:
    """By kind, of which number the kept units are a multiple."""
    return {"neurons": stage.round_to, "hidden": stage.round_to}


def selection_of(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    counts: Mapping[str, int],
    goals: Sequence[Goal],
    *,
    model_type: str,
) -> Selection:
    """The plan that keeps the best so many units of each site, beside what goals ask for.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        counts: by site, how many units stay.
        goals: what is to go.
        model_type: of the model, for the plan.
    """
    kept = {
        site.name: SitePlan(site.kind, site.units, rankings[site.name].kept(counts[site.name]))
        for site in sites
    }
    outcomes = tuple(
        Outcome(goal.cost, goal.asked, goal.removed(counts), goal.total) for goal in goals
    )
    return Selection(Plan(model_type, kept), outcomes, total_error(sites, rankings, counts))


def even_counts(
    sites: Sequence[Site], counts: Mapping[str, int], round_to: Mapping[str, int]
) -> Counts:
    """As many units in each layer of a stack: their mean, rounded down, so that goals stay met.

    Args:
        sites: from `find_sites`.
        counts: by site, how many units stay.
        round_to: by kind, of which number the kept units are a multiple.
    """
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.stack, site.kind), []).append(site)
    result: Counts = {}
    for (_, kind), group in groups.items():
        step = round_to.get(kind, 1)
        mean = sum(counts[site.name] for site in group) // len(group)
        even = max(mean // step * step, min(step, *(site.units for site in group)))
        result |= {site.name: even for site in group}
    return {site.name: result[site.name] for site in sites}


def decide(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    stage: Prune,
    goals: Sequence[Goal],
    *,
    model_type: str,
) -> Selection:
    """The plan that meets the goals of a stage.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        stage: solver, floors and `round_to`.
        goals: what is to go.
        model_type: of the model, for the plan.
    """
    counts = allocate(
        sites,
        rankings,
        goals,
        solver=stage.solver,
        floors=floors_of(stage),
        round_to=steps_of(stage),
    )
    if stage.even:
        counts = even_counts(sites, counts, steps_of(stage))
    return selection_of(sites, rankings, counts, goals, model_type=model_type)

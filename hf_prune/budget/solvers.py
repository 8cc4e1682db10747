"""Solvers: how many units of each site stay, within a budget.

A site can be kept at some widths, its levels (`budget.levels`). Some solvers follow one order of
all steps from level to level, and stop at the first that does not fit: then a larger budget keeps a
superset. `knapsack` chooses the levels together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.budget.bounded import bounded_knapsack, relax
from hf_prune.budget.knapsack import knapsack
from hf_prune.budget.levels import Counts, Levels
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import did_you_mean
from hf_prune.sites import Site

MAX_LEVELS = 128
"""Levels of a site, at most about so many, of which all combinations are merged where bounds prove
nothing."""


@dataclass(frozen=True)
class Problem:
    """What a solver is given.

    Attributes:
        sites: from `find_sites`.
        rankings: in which order the units of each site go, and what is lost.
        tables: by site `[U + 1]` int64, what keeping `k` units costs.
        budget: what all kept units may cost together.
        allowed: by site, the counts of units that it can keep.
    """

    sites: Sequence[Site]
    rankings: Mapping[str, Ranking]
    tables: Mapping[str, Tensor]
    budget: int
    allowed: Levels

    def levels(self, site: Site) -> Tensor:
        """The counts of units that the site can keep, increasing."""
        return torch.tensor(self.allowed[site.name])

    def errors(self, site: Site, levels: Tensor) -> Tensor:
        """What is lost at each level, `[levels]`."""
        return self.rankings[site.name].errors[site.units - levels]


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


def _merged(problem: Problem, levels: Sequence[Tensor]) -> Counts:
    """The best of some levels of each site, all of them merged."""
    costs, errors = _weighed(problem, levels)
    chosen = knapsack(costs, errors, problem.budget)
    if chosen is None:  # the floors alone exceed it: keep no more than them
        chosen = [0] * len(levels)
    return _counts(problem, levels, chosen)


def _weighed(problem: Problem, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What each level costs, and what is lost at it."""
    costs = [problem.tables[s.name][x] for s, x in zip(problem.sites, levels, strict=True)]
    errors = [problem.errors(s, x) for s, x in zip(problem.sites, levels, strict=True)]
    return costs, errors


def _counts(problem: Problem, levels: Sequence[Tensor], chosen: Sequence[int]) -> Counts:
    triples = zip(problem.sites, levels, chosen, strict=True)
    return {site.name: int(level[index]) for site, level, index in triples}


def _lost(problem: Problem, counts: Counts) -> float:
    return sum(problem.rankings[name].error_of(count) for name, count in counts.items())


def exact(problem: Problem) -> Counts:
    """The levels with the least total error within the budget, proved by bounds.

    Where the proof takes too much it is the best of some, close to it.
    """
    levels = [problem.levels(site) for site in problem.sites]
    costs, errors = _weighed(problem, levels)
    if sum(int(cost.min()) for cost in costs) > problem.budget:
        return _counts(problem, levels, [0] * len(levels))
    relaxed = relax(costs, errors, problem.budget)
    start = _in_order(problem, _global, _counts(problem, levels, relaxed.levels))
    known = [
        int(torch.searchsorted(level, start[site.name]))
        for site, level in zip(problem.sites, levels, strict=True)
    ]
    chosen, proved = bounded_knapsack(costs, errors, problem.budget, relaxed, known)
    found = [_counts(problem, levels, chosen), _counts(problem, levels, relaxed.levels)]
    if not proved:
        some = _merged(problem, [_thinned(level) for level in levels])
        found.append(_in_order(problem, _global, some))
    return min(found, key=lambda counts: _lost(problem, counts))


Solver = Callable[[Problem], Counts]

SOLVERS: dict[str, Solver] = {
    "global": global_,
    "knapsack": exact,
    "mask_search": global_,  # with rankings that `prepare` has made for it
    "template": uniform,
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

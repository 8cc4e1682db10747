"""As many units in every layer: of each kind and stack one number, found by the same solvers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from hf_prune.budget.allocate import allocate
from hf_prune.budget.costs import Goal
from hf_prune.budget.levels import Counts, Levels
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.sites import Site


def _groups(sites: Sequence[Site]) -> list[list[Site]]:
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.stack, site.kind), []).append(site)
    return list(groups.values())


def allocate_evenly(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    goals: Sequence[Goal],
    *,
    solver: str,
    levels: Levels,
) -> Counts:
    """How many units of each site stay, where all layers of a stack must have as many.

    `knapsack` chooses among even plans, exactly: to it all sites of a kind and stack are one. Other
    solvers give the layers their own numbers, of which the mean is taken, as it is where layers are
    uneven already.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        goals: all of them are met, unless the floors alone exceed one.
        solver: a key of `SOLVERS`.
        levels: by site, the counts of units that it can keep.

    Raises:
        ConfigError: when the layers have no level in common.
    """
    groups = _groups(sites)
    alike = all(len({site.units for site in group}) == 1 for group in groups)
    if solver != "knapsack" or not alike:
        counts = allocate(sites, rankings, goals, solver=solver, levels=levels)
        return even_counts(sites, rankings, counts, goals, levels)
    firsts = [group[0] for group in groups]
    together = {
        group[0].name: Ranking(
            rankings[group[0].name].order,
            sum((rankings[site.name].errors for site in group[1:]), rankings[group[0].name].errors),
        )
        for group in groups
    }
    priced = [
        dataclasses.replace(
            goal,
            tables={
                group[0].name: tuple(
                    map(sum, zip(*(goal.tables[site.name] for site in group), strict=True))
                )
                for group in groups
            },
        )
        for goal in goals
    ]
    shared = {group[0].name: _common(group, levels) for group in groups}
    found = allocate(firsts, together, priced, solver=solver, levels=shared)
    return {site.name: found[group[0].name] for group in groups for site in group}


def _common(group: Sequence[Site], levels: Levels) -> list[int]:
    """The levels that all sites of a group have, increasing."""
    common = set.intersection(*(set(levels[site.name]) for site in group))
    if not common:
        raise ConfigError(
            f"even: the layers have no number of {group[0].kind} in common that floors and "
            f"round_to allow: they have {sorted({site.units for site in group})} of them."
        )
    return sorted(common)


def _cheapest(
    exceeded: Sequence[Goal],
    rankings: Mapping[str, Ranking],
    counts: Counts,
    steps: Sequence[Counts],
) -> Counts:
    """The step that loses least for what it saves of the goals that are exceeded."""

    def price(step: Counts) -> float:
        names = {name: counts[name] for name in step}
        lost = sum(rankings[n].error_of(step[n]) - rankings[n].error_of(counts[n]) for n in names)
        saved = sum(
            (goal.tables[name][counts[name]] - goal.tables[name][step[name]]) / max(goal.budget, 1)
            for goal in exceeded
            for name in names
        )
        return lost / saved if saved > 0 else math.inf

    return min(steps, key=price)


def even_counts(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    counts: Mapping[str, int],
    goals: Sequence[Goal],
    levels: Levels,
) -> Counts:
    """As many units in each layer of a stack: at most their mean, and less until goals are met.

    Units of different sites may cost differently, such as heads of self- and cross-attention, so
    that the mean alone can exceed a goal.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        counts: by site, how many units stay.
        goals: what is to go.
        levels: by site, the counts that are allowed.

    Raises:
        ConfigError: when the layers have no level in common.
    """
    groups = dict(enumerate(_groups(sites)))
    common = {key: _common(group, levels) for key, group in groups.items()}
    result = {site.name: 0 for site in sites}
    for key, group in groups.items():
        mean = sum(counts[site.name] for site in group) // len(group)
        even = max((level for level in common[key] if level <= mean), default=common[key][0])
        result |= {site.name: even for site in group}
    while exceeded := [goal for goal in goals if goal.spent(result) > goal.budget]:
        steps = []
        for key, group in groups.items():
            at = common[key].index(result[group[0].name])
            steps += [{site.name: common[key][at - 1] for site in group}] if at else []
        if not steps:
            break
        result |= _cheapest(exceeded, rankings, result, steps)
    return result

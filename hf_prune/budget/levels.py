"""Levels: the counts of units that each site can keep, by what stage and site demand."""

import fnmatch
import math
from collections.abc import Mapping, Sequence

from hf_prune.budget.costs import Goal
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import Prune, did_you_mean
from hf_prune.sites import Site

Counts = dict[str, int]
"""By site, how many of its units stay."""
Levels = Mapping[str, Sequence[int]]
"""By site, the counts of units that it can keep, increasing; the last one is all of them."""


def levels_of(site: Site, floor: int, step: int) -> list[int]:
    """The counts of units that a site can keep: from a floor on, in steps, or all of them.

    Args:
        site: whose own floor and multiple hold too.
        floor: units that must stay; all of them, where there are no more.
        step: of which number the kept units are a multiple.
    """
    floor = min(site.units, max(floor, site.floor))
    step = math.lcm(step, site.multiple)
    first = min(site.units, -(-floor // step) * step)
    return [*range(first, site.units, step), site.units]


def _floor_of(site: Site, stage: Prune) -> int:
    by_kind = {"heads": stage.min_heads, "neurons": stage.min_neurons}
    by_kind |= {"expert_neurons": stage.min_neurons, "hidden": 1, "query_heads": stage.min_heads}
    named = [n for pattern, n in stage.floors.items() if fnmatch.fnmatch(site.name, pattern)]
    return max(by_kind.get(site.kind, 0), *named, 0)


def stage_levels(sites: Sequence[Site], stage: Prune) -> dict[str, list[int]]:
    """The levels of each site: floors by kind and by name, `round_to`, and what the site demands.

    Args:
        sites: from `find_sites`.
        stage: a structured one.

    Raises:
        ConfigError: when a pattern of `floors` matches no site.
    """
    names = [site.name for site in sites]
    for pattern in stage.floors:
        if sites and not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"floors: the pattern {pattern!r} matches no site{did_you_mean(pattern, names)}"
            )
    rounded = ("neurons", "expert_neurons", "hidden")
    return {
        site.name: levels_of(
            site, _floor_of(site, stage), stage.round_to if site.kind in rounded else 1
        )
        for site in sites
    }


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
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.stack, site.kind), []).append(site)
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

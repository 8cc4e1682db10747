"""Levels: the counts of units that each site can keep, by what stage and site demand."""

import fnmatch
import math
from collections.abc import Mapping, Sequence

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

"""Templates carried out: which levels, and which units, a pattern leaves to a site."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_prune.budget.levels import Levels
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import (
    AlternateLayers,
    Ends,
    EveryHead,
    Rule,
    Rules,
    Template,
    UniformWidth,
    did_you_mean,
)
from hf_prune.sites import QUERY_HEADS, Site

HEADS = ("heads", QUERY_HEADS)
"""Kinds of units that are heads."""


@dataclass(frozen=True)
class _Saying:
    """What a pattern says of one site: the counts it allows, and units where it names them."""

    levels: Sequence[int]
    units: tuple[int, ...] | None = None


def _exactly(site: Site, levels: Sequence[int], units: Sequence[int]) -> _Saying:
    """Exactly these units stay."""
    if any(unit >= site.units for unit in units):
        raise ConfigError(
            f"the template names unit {max(units)} of {site.name}, which has {site.units} "
            f"{site.kind}: they are numbered from 0."
        )
    _check(site, levels, len(units))
    return _Saying([len(units)], tuple(sorted(units)))


def _check(site: Site, levels: Sequence[int], count: int) -> None:
    if count not in levels:
        close = min(levels, key=lambda level: abs(level - count))
        raise ConfigError(
            f"the template keeps {count} of {site.units} {site.kind} of {site.name}, which floors "
            f"(min_heads, min_neurons, floors) or round_to forbid: {close} is the closest that "
            "they allow. Change one of them; min_heads: 0 and min_neurons: 0 let a whole layer go."
        )


def _count(site: Site, levels: Sequence[int], count: int) -> _Saying:
    """So many stay, the best ones."""
    count = min(count, site.units)
    _check(site, levels, count)
    return _Saying([count])


def _share(site: Site, levels: Sequence[int], share: float) -> _Saying:
    """This share stays, rounded down to an allowed level."""
    below = [level for level in levels if level <= share * site.units + 1e-9]
    return _Saying([max(below, default=levels[0])])


def _by_rule(rule: Rule, site: Site, levels: Sequence[int]) -> _Saying:
    if rule.count is not None:
        return _count(site, levels, rule.count)
    if rule.share is not None:
        return _share(site, levels, rule.share)
    if rule.units is not None:
        return _exactly(site, levels, rule.units)
    return _exactly(site, levels, range(0, site.units, rule.every or 1))


def _matches(rule: Rule, site: Site) -> bool:
    layers = rule.layers
    numbers = (site.layer, site.layer - site.depth)
    return (
        fnmatch.fnmatch(site.name, rule.sites)
        and rule.kind in (None, site.kind)
        and (layers is None or any(number in layers for number in numbers))
    )


def _layer(site: Site, levels: Sequence[int], stays: bool) -> _Saying:
    return _count(site, levels, site.units if stays else 0)


def _rounded(template: UniformWidth, site: Site, levels: Sequence[int]) -> _Saying:
    wide = site.kind in ("neurons", "expert_neurons")
    step = template.multiple if wide else 1
    allowed = [level for level in levels if level % step == 0 or level == site.units]
    return _Saying(allowed) if template.share is None else _share(site, allowed, template.share)


def _saying(template: Template, site: Site, levels: Sequence[int]) -> _Saying | None:
    """What a template says of a site; None where it leaves it to the budget."""
    match template:
        case AlternateLayers():
            return _layer(site, levels, site.layer % template.every == 0)
        case Ends():
            stays = site.layer < template.first or site.layer >= site.depth - template.last
            return _layer(site, levels, stays)
        case EveryHead():
            heads = range(0, site.units, template.every)
            return _exactly(site, levels, heads) if site.kind in HEADS else None
        case UniformWidth():
            return _rounded(template, site, levels)
        case Rules():
            rules = [rule for rule in template.rules if _matches(rule, site)]
            return _by_rule(rules[-1], site, levels) if rules else None


def _kept_last(ranking: Ranking, units: Sequence[int]) -> Ranking:
    """The ranking in which all other units go before these. Their losses stay what they were."""
    stays = torch.zeros(ranking.units, dtype=torch.bool)
    stays[list(units)] = True
    last = stays[ranking.order]
    losses = ranking.errors.diff()
    order = torch.cat([ranking.order[~last], ranking.order[last]])
    return Ranking.from_losses(order, torch.cat([losses[~last], losses[last]]))


def _check_rules(template: Template, sites: Sequence[Site]) -> None:
    if isinstance(template, EveryHead) and not any(site.kind in HEADS for site in sites):
        raise ConfigError("template: every_head is about heads, and the stage has no units of them")
    for rule in template.rules if isinstance(template, Rules) and sites else ():
        names = [site.name for site in sites]
        if not fnmatch.filter(names, rule.sites):
            raise ConfigError(
                f"template: the pattern {rule.sites!r} matches no site"
                f"{did_you_mean(rule.sites, names)}"
            )
        if not any(_matches(rule, site) for site in sites):
            raise ConfigError(
                f"template: no site of {rule.sites!r} has kind={rule.kind} and is in "
                f"layers={list(rule.layers or ())}."
            )


def apply_template(
    template: Template, sites: Sequence[Site], rankings: Mapping[str, Ranking], levels: Levels
) -> tuple[dict[str, Ranking], dict[str, list[int]]]:
    """Rankings and levels under which every solver keeps to a template.

    Args:
        template: of the recipe.
        sites: from `find_sites`.
        rankings: of their units. Where the template says how many, the best stay; where it says
            which, all others go first, and the error is the sum of what each was ranked at.
        levels: that floors and `round_to` allow.

    Returns:
        New rankings, and the levels that are left to each site: one where the template fixes it.

    Raises:
        ConfigError: when a rule matches no site, or a site cannot keep what the template says.
    """
    _check_rules(template, sites)
    ranked, allowed = dict(rankings), {name: list(each) for name, each in levels.items()}
    for site in sites:
        saying = _saying(template, site, levels[site.name])
        if saying is not None:
            allowed[site.name] = list(saying.levels)
            if saying.units is not None:
                ranked[site.name] = _kept_last(rankings[site.name], saying.units)
    return ranked, allowed

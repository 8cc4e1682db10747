"""Coarse gates: of whole layers and blocks, which multiply the gates of all their units.

Source: Xia et al. 2022, arXiv:2204.00408. Here a block is an attention or a feed-forward site; the
hidden width is in `width`. Costs are tables over the number of units that stay, so the expected
cost of a site is read at the expected number: exact where every unit costs the same, interpolated
for measured times.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.budget.costs import Goal
from hf_prune.sites import Site


def _key(site: Site, group: str) -> tuple[object, ...]:
    return (site.stack, site.layer) if group == "layers" else (site.name,)


def coarse_members(sites: Sequence[Site], groups: Sequence[str]) -> tuple[int, list[Tensor]]:
    """How many coarse gates there are, and which of them each unit hangs on.

    A site that must keep something hangs on none, which is -1.

    Args:
        sites: from `find_sites`.
        groups: `layers`, `blocks`; `hidden` is passed over.

    Returns:
        The number of gates, and for each group `[U]` int64, counted from the first coarse gate.
    """
    count, members = 0, []
    for group in (name for name in groups if name != "hidden"):
        keys = dict.fromkeys(_key(site, group) for site in sites if not site.floor)
        places = {key: count + index for index, key in enumerate(keys)}
        each = [-1 if site.floor else places[_key(site, group)] for site in sites]
        units = torch.tensor([site.units for site in sites])
        members.append(torch.tensor(each).repeat_interleave(units))  # [U]
        count += len(keys)
    return count, members


def coarse_product(coarse: Tensor, members: Sequence[Tensor], units: int) -> Tensor:
    """What coarse gates multiply the gate of each unit by, `[U]`.

    Args:
        coarse: `[G]`, the gates, or the probabilities that they are open.
        members: from `coarse_members`.
        units: of all sites.
    """
    padded = torch.cat([coarse, coarse.new_ones(1)])  # -1 is a gate that is always open
    product = coarse.new_ones(units)
    for member in members:
        product = product * padded[member.to(coarse.device)]
    return product


def share_tables(goal: Goal, sites: Sequence[Site], device: torch.device) -> list[Tensor]:
    """By site `[U + 1]`, what keeping so many units costs, as a share of the goal's total."""
    return [
        (torch.tensor(goal.tables[site.name], dtype=torch.float64) / goal.total).float().to(device)
        for site in sites
    ]


def _read(table: Tensor, count: Tensor) -> Tensor:
    """A table at a count that is no integer, by a straight line between its neighbours."""
    low = count.detach().floor().long().clamp(0, len(table) - 2)
    return table[low] + (count - low) * (table[low + 1] - table[low])


def expected_share(
    tables: Sequence[Tensor], opened: Mapping[str, Tensor], coarse: Mapping[str, Tensor]
) -> Tensor:
    """Expected cost of all sites, as a share; with a graph.

    Args:
        tables: from `share_tables`.
        opened: by site in the same order `[U]`, the probability of each fine gate to be open.
        coarse: by site `[U]`, that of the coarse gates that its units hang on.
    """
    total = tables[0].new_zeros(())
    for table, (name, fine) in zip(tables, opened.items(), strict=True):
        whole = coarse[name][0]
        total = total + whole * _read(table, fine.sum()) + (1 - whole) * table[0]
    return total

"""Exact costs, in Python integers: what a site costs at every width, and what a goal allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_prune.errors import ConfigError
from hf_prune.recipe import count_to_remove, did_you_mean
from hf_prune.sites import Site

COSTS = ("parameters", "macs", "bytes")
"""What a budget can count without measuring."""


@dataclass(frozen=True)
class Lengths:
    """How many tokens a site sees when one example passes.

    Attributes:
        own: that run through it.
        read: that its heads look at; `own`, but for cross-attention.
        macs_on_read: of a unit's `macs_per_token`, what is spent on each token that is looked at
            instead: keys and values of cross-attention, where `read` differs.
    """

    own: int
    read: int
    macs_on_read: int = 0


Tokens = int | Mapping[str, Lengths]
"""Tokens of one sequence that all sites see, or what each of them sees, by its name."""


def unit_cost(site: Site, cost: str, tokens: Tokens) -> int:
    """What one unit of a site costs.

    Args:
        site: from `find_sites`.
        cost: `parameters`; or `macs`: multiply-accumulates of one sequence, the quadratic part of
            attention (scores and mixing, `2 * T^2 * width`) included.
        tokens: of that sequence; or of each site (`hf_prune.measure.lengths.site_lengths`), where
            images, sound or two sequences are read.

    Raises:
        ConfigError: for an unknown cost.
    """
    if cost == "parameters":
        return site.parameters
    if cost == "macs":
        seen = Lengths(tokens, tokens) if isinstance(tokens, int) else tokens[site.name]
        linear = seen.own * (site.macs_per_token - seen.macs_on_read)
        linear += seen.read * seen.macs_on_read
        return linear + 2 * seen.own * seen.read * site.attention_width
    raise ConfigError(f"unknown cost {cost!r}{did_you_mean(cost, COSTS)}")


@dataclass(frozen=True)
class Goal:
    """What may be spent, in one unit of cost.

    Attributes:
        cost: its name: `parameters`, `macs`, `bytes`, or `latency_ns`.
        tables: by site, what it costs to keep `k` of its units, for `k` from 0 to all of them.
            Never falls with `k`.
        total: what `asked` is a part of, before pruning.
        asked: how much of it is to go, at least.
    """

    cost: str
    tables: Mapping[str, tuple[int, ...]]
    total: int
    asked: int

    @property
    def prunable(self) -> int:
        """What all units cost together, beyond what cannot go."""
        return sum(table[-1] for table in self.tables.values())

    @property
    def budget(self) -> int:
        """What the kept units may cost together."""
        return self.prunable - self.asked

    def spent(self, counts: Mapping[str, int]) -> int:
        """What it costs to keep so many units of each site."""
        return sum(table[counts[name]] for name, table in self.tables.items())

    def removed(self, counts: Mapping[str, int]) -> int:
        """What is gone when so many units of each site stay."""
        return self.prunable - self.spent(counts)


def cost_tables(sites: Sequence[Site], cost: str, tokens: Tokens) -> dict[str, tuple[int, ...]]:
    """By site, what it costs to keep each number of its units.

    It grows by the same amount with each unit, but for what belongs to pairs of them.
    """
    per_unit = {site.name: unit_cost(site, cost, tokens) for site in sites}
    return {
        site.name: tuple(
            count * per_unit[site.name] + count**2 * site.square for count in range(site.units + 1)
        )
        for site in sites
    }


def make_goal(
    sites: Sequence[Site],
    cost: str,
    sparsity: float,
    *,
    tokens: Tokens = 1,
    base: int | None = None,
) -> Goal:
    """The goal of removing a fraction.

    Args:
        sites: from `find_sites`.
        cost: a linear cost: `parameters` or `macs`.
        sparsity: fraction to remove, in [0, 1).
        tokens: as in `unit_cost`, where MACs are counted.
        base: what the sparsity is a fraction of; the cost of all units, if not given.
    """
    tables = cost_tables(sites, cost, tokens)
    total = sum(table[-1] for table in tables.values()) if base is None else base
    return Goal(cost, tables, total, count_to_remove(sparsity, total))

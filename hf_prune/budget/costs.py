"""Exact costs of units, in Python integers."""

from hf_prune.errors import ConfigError
from hf_prune.recipe import did_you_mean
from hf_prune.sites import Site

COSTS = ("parameters", "macs")
"""What a budget can count."""


def unit_cost(site: Site, cost: str, sequence_length: int) -> int:
    """What one unit of a site costs.

    Args:
        site: from `find_sites`.
        cost: `parameters`; or `macs`: multiply-accumulates of one sequence, the quadratic part of
            attention (scores and mixing, `2 * T^2 * width`) included.
        sequence_length: tokens of that sequence.

    Raises:
        ConfigError: for an unknown cost.
    """
    if cost == "parameters":
        return site.parameters
    if cost == "macs":
        quadratic = 2 * sequence_length**2 * site.attention_width
        return sequence_length * site.macs_per_token + quadratic
    raise ConfigError(f"unknown cost {cost!r}{did_you_mean(cost, COSTS)}")

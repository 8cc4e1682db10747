"""Costs of units, against counts by hand."""

import pytest

from hf_prune.budget.costs import unit_cost
from hf_prune.errors import ConfigError
from hf_prune.sites import find_sites


def test_bert_by_hand(tiny):
    heads, neurons = find_sites(tiny("bert"))[:2]
    # width 32, heads of 8: three projections with bias, and the output's columns
    assert unit_cost(heads, "parameters", 10) == 3 * (8 * 32 + 8) + 32 * 8
    assert unit_cost(heads, "macs", 10) == 10 * 4 * 8 * 32 + 2 * 10 * 10 * 8
    assert unit_cost(neurons, "parameters", 10) == 32 + 1 + 32
    assert unit_cost(neurons, "macs", 10) == 10 * 2 * 32


def test_llama_by_hand(tiny):
    heads, neurons = find_sites(tiny("llama"))[:2]
    # a key/value head of 8 with its two query heads, without biases
    assert unit_cost(heads, "parameters", 10) == (16 + 8 + 8 + 16) * 32
    assert unit_cost(heads, "macs", 10) == 10 * 48 * 32 + 2 * 10 * 10 * 16
    assert unit_cost(neurons, "parameters", 10) == 3 * 32


def test_no_overflow(tiny):
    """Counts are Python integers."""
    site = find_sites(tiny("bert"))[0]
    assert unit_cost(site, "macs", 10**10) == 10**10 * 1024 + 2 * 10**20 * 8


def test_unknown_cost(tiny):
    site = find_sites(tiny("bert"))[0]
    with pytest.raises(ConfigError, match=r"unknown cost 'mac'; did you mean 'macs'.*parameters"):
        unit_cost(site, "mac", 10)

"""The goals of a target in numbers: what is counted, and how long a network may take."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from transformers import PreTrainedModel

from hf_prune.budget.costs import Goal, cost_tables, make_goal
from hf_prune.measure.counts import count_macs, count_memory, count_parameters
from hf_prune.measure.latency_table import NS_PER_MS
from hf_prune.measure.lengths import site_lengths
from hf_prune.recipe import Prune, Target, share_of
from hf_prune.sites import Site, base_model, get_parameter, logical_weight, projection

PRUNABLE = "prunable_parameters"
"""The name of the cost of which a target takes a sparsity."""

Count = Callable[[PreTrainedModel], int]
Tables = Mapping[str, tuple[int, ...]]


def _allowed(value: "str | int", total: int) -> int:
    if isinstance(value, int):
        return value
    return math.floor(Fraction(value.removesuffix("x")) * total)


def _table_of_bytes(model: PreTrainedModel, site: Site) -> tuple[int, ...]:
    """What each number of kept units takes in memory, each matrix in its own dtype."""
    base = base_model(model)
    if site.gate.parameter:
        size = get_parameter(base, site.gate).element_size()
        unit = size * site.parameters
    else:
        size = projection(base, site.gate.module).weight.element_size()
        unit = 0
        for item in site.slices:
            module = projection(base, item.module)
            weight = logical_weight(module)
            unit += weight.element_size() * item.width * int(weight.shape[1 - item.axis])
            if item.axis == 0 and module.bias is not None:
                unit += module.bias.element_size() * item.width
    pairs = size * site.square
    return tuple(count * unit + count**2 * pairs for count in range(site.units + 1))


def counted_goals(
    model: PreTrainedModel,
    given: PreTrainedModel,
    sites: Sequence[Site],
    stage: Prune,
    target: Target,
) -> list[Goal]:
    """The goals that are counted: shares are of the given model, what goes is of this one."""
    goals = []
    length = stage.sequence_length

    def goal(cost: str, value: "str | int", count: Count, tables: Tables) -> Goal:
        total = count(model)
        whole = total if given is model else count(given)
        return Goal(cost, tables, total, max(0, total - _allowed(value, whole)))

    if target.parameters is not None:
        tables = cost_tables(sites, "parameters", length)
        goals.append(goal("parameters", target.parameters, count_parameters, tables))
    if target.macs is not None:
        tables = cost_tables(sites, "macs", site_lengths(model, sites, length))
        goals.append(goal("macs", target.macs, lambda each: count_macs(each, length), tables))
    if target.bytes is not None:
        tables = {site.name: _table_of_bytes(model, site) for site in sites}
        goals.append(goal("bytes", target.bytes, count_memory, tables))
    if target.sparsity is not None:
        made = make_goal(sites, "parameters", target.sparsity)
        goals.append(dataclasses.replace(made, cost=PRUNABLE))
    return goals


def allowed_ns(target: Target, given_ns: int) -> int:
    """The latency that a target allows, in ns, of a network that takes `given_ns`."""
    limits: list[float] = []
    if target.latency_ms is not None:
        limits.append(target.latency_ms * NS_PER_MS)
    if target.speedup is not None:
        limits.append(given_ns / share_of(target.speedup))
    return int(min(limits))

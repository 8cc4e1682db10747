"""The knapsack with bounds against an integer program."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_program import least_error

from hf_prune.budget import bounded
from hf_prune.budget.bounded import bounded_knapsack, relax


@st.composite
def problems(draw):
    """Sites whose costs never fall with the level, and whose errors are any."""
    costs, errors = [], []
    for _ in range(draw(st.integers(1, 6))):
        levels = draw(st.integers(1, 8))
        steps = draw(st.lists(st.integers(0, 20), min_size=levels, max_size=levels))
        costs.append(torch.tensor(steps).cumsum(0))
        values = draw(st.lists(st.floats(-2, 9), min_size=levels, max_size=levels))
        errors.append(torch.tensor(values, dtype=torch.float64))
    least = sum(int(cost[0]) for cost in costs)
    return costs, errors, least + draw(st.integers(0, 200))


def total(tables, levels):
    return sum(float(table[at]) for table, at in zip(tables, levels, strict=True))


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_equals_an_integer_program(problem):
    costs, errors, budget = problem
    relaxed = relax(costs, errors, budget)
    known = [0] * len(costs)
    levels, proved = bounded_knapsack(costs, errors, budget, relaxed, known)
    assert proved
    assert total(costs, levels) <= budget
    expected = least_error([c.tolist() for c in costs], [e.tolist() for e in errors], budget)
    assert total(errors, levels) == pytest.approx(expected, abs=1e-6)
    assert relaxed.bound <= expected + 1e-6
    assert total(costs, relaxed.levels) <= budget


def test_without_room_it_is_not_proved_and_never_worse_than_what_is_known(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_ENTRIES", 40)
    generator = torch.Generator().manual_seed(0)
    costs = [torch.arange(30) * int(c) for c in torch.randint(3, 90, (6,), generator=generator)]
    errors = [1 - (cost / cost[-1].double()).square() for cost in costs]  # all or nothing
    budget = sum(int(cost[-1]) for cost in costs) // 3
    relaxed = relax(costs, errors, budget)
    levels, proved = bounded_knapsack(costs, errors, budget, relaxed, relaxed.levels)
    assert not proved
    assert total(costs, levels) <= budget
    assert total(errors, levels) <= total(errors, relaxed.levels)

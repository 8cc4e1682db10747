"""The knapsack against an integer program."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_program import least_error

from hf_prune.budget.knapsack import knapsack


@st.composite
def problems(draw):
    costs, errors = [], []
    for _ in range(draw(st.integers(1, 6))):
        levels = draw(st.integers(1, 6))
        costs.append(draw(st.lists(st.integers(0, 50), min_size=levels, max_size=levels)))
        errors.append(draw(st.lists(st.floats(0, 9), min_size=levels, max_size=levels)))
    return costs, errors


def solve(costs, errors, budget, **options):
    return knapsack(
        [torch.tensor(c) for c in costs],
        [torch.tensor(e, dtype=torch.float64) for e in errors],
        budget,
        **options,
    )


@settings(max_examples=150, deadline=None)
@given(problem=problems(), budget=st.integers(0, 200))
def test_equals_an_integer_program(problem, budget):
    costs, errors = problem
    levels, expected = solve(costs, errors, budget), least_error(costs, errors, budget)
    if expected is None:
        assert levels is None
        return
    assert sum(c[i] for c, i in zip(costs, levels, strict=True)) <= budget
    total = sum(e[i] for e, i in zip(errors, levels, strict=True))
    assert total == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), budget=st.integers(0, 200), points=st.integers(2, 5))
def test_never_over_the_budget_with_few_points(problem, budget, points):
    costs, errors = problem
    levels = solve(costs, errors, budget, max_points=points)
    if levels is None:
        assert sum(map(min, costs)) > budget
    else:
        assert sum(c[i] for c, i in zip(costs, levels, strict=True)) <= budget


def test_thinning_stays_close_on_a_large_problem():
    generator = torch.Generator().manual_seed(0)
    costs = [
        torch.arange(97) * int(c) for c in torch.randint(700, 60_000, (24,), generator=generator)
    ]
    scale = torch.rand(24, generator=generator, dtype=torch.float64)
    errors = [s * torch.linspace(1, 0, 97, dtype=torch.float64) ** 2 for s in scale]
    budget = sum(int(c[-1]) for c in costs) // 3
    found = {
        points: sum(
            float(e[i])
            for e, i in zip(errors, knapsack(costs, errors, budget, points), strict=True)
        )
        for points in (1 << 9, 1 << 12)
    }
    assert found[1 << 12] <= found[1 << 9] <= 1.02 * found[1 << 12]

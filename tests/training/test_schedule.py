"""Schedules: monotone, from 0 to 1."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.recipe import Schedule
from hf_prune.training.schedule import bounds, cubic, is_due, share

SCHEDULES = st.builds(
    Schedule, start=st.floats(0, 0.45), end=st.floats(0.5, 1), every=st.integers(1, 30)
)


@given(a=st.floats(-1, 2), b=st.floats(-1, 2))
def test_cubic_is_monotone(a, b):
    low, high = sorted((a, b))
    assert 0 <= cubic(low) <= cubic(high) <= 1


def test_cubic_ends():
    assert (cubic(0), cubic(1), cubic(-3), cubic(7)) == (0, 1, 0, 1)
    assert cubic(0.5) == pytest.approx(0.875)


@settings(max_examples=150, deadline=None)
@given(schedule=SCHEDULES, steps=st.integers(2, 300))
def test_share_of_a_whole_training(schedule, steps):
    shares = [share(schedule, step, steps) for step in range(steps + 1)]
    assert shares == sorted(shares)
    first, last = bounds(schedule, steps)
    assert 0 <= first < last <= steps
    assert shares[first] == 0
    assert shares[last] == shares[-1] == 1
    assert all(value < 1 for value in shares[:last])


@settings(max_examples=150, deadline=None)
@given(schedule=SCHEDULES, steps=st.integers(2, 300))
def test_decisions(schedule, steps):
    due = [step for step in range(1, steps + 1) if is_due(schedule, step, steps)]
    first, last = bounds(schedule, steps)
    assert due[-1] == last, "the full sparsity is reached"
    assert due[:-1] == list(range(first + schedule.every, last, schedule.every))


def test_by_hand():
    schedule = Schedule(start=0.1, end=0.6, every=20)
    assert bounds(schedule, 100) == (10, 60)
    assert [s for s in range(101) if is_due(schedule, s, 100)] == [30, 50, 60]
    assert share(schedule, 35, 100) == pytest.approx(1 - 0.5**3)

"""Schedules: monotone, from 0 to 1."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.recipe import Schedule
from hf_prune.training.schedule import bounds, cubic, curve, interval, is_due, share

KINDS = ("one_shot", "linear", "cubic", "exponential", "step")
SCHEDULES = st.builds(
    Schedule,
    kind=st.sampled_from(KINDS),
    start=st.floats(0, 0.45),
    end=st.floats(0.5, 1),
    every=st.integers(1, 30),
    levels=st.integers(1, 9),
    rate=st.floats(1e-3, 50),
)


@given(schedule=SCHEDULES, a=st.floats(-1, 2), b=st.floats(-1, 2))
def test_curves_are_monotone(schedule, a, b):
    low, high = sorted((a, b))
    assert 0 <= curve(schedule, low) <= curve(schedule, high) <= 1


@given(schedule=SCHEDULES)
def test_curves_end_at_0_and_1(schedule):
    assert [curve(schedule, x) for x in (-3, 0, 1, 7)] == [0, 0, 1, 1]


def test_curves_by_hand():
    assert cubic(0.5) == pytest.approx(0.875)
    assert curve(Schedule(kind="linear"), 0.3) == pytest.approx(0.3)
    assert curve(Schedule(kind="one_shot"), 0.01) == 1
    steps = Schedule(kind="step", levels=4)
    assert [curve(steps, x) for x in (0.1, 0.25, 0.26, 0.9)] == [0.25, 0.25, 0.5, 1]
    fast = Schedule(kind="exponential", rate=2.0)
    expected = (1 - math.exp(-1)) / (1 - math.exp(-2))
    assert curve(fast, 0.5) == pytest.approx(expected)


@settings(max_examples=150, deadline=None)
@given(schedule=SCHEDULES, steps=st.integers(2, 300))
def test_share_of_a_whole_training(schedule, steps):
    shares = [share(schedule, step, steps) for step in range(steps + 1)]
    assert shares == sorted(shares)
    first, last = bounds(schedule, steps)
    assert 0 <= first < last <= steps
    assert shares[first] == 0
    assert shares[last] == shares[-1] == 1
    if schedule.kind in ("linear", "cubic"):
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


def test_every_epoch():
    schedule = Schedule(start=0.0, end=0.8, every=1, per="epochs")
    assert interval(schedule, 50, 5.0) == 10
    assert [s for s in range(51) if is_due(schedule, s, 50, 5.0)] == [10, 20, 30, 40]

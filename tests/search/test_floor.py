"""Bisection and Optuna: the most that may go, within trials and time, from anywhere."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune import compress
from hf_prune.errors import ConfigError
from hf_prune.measure.counts import count_parameters
from hf_prune.recipe import Floor, load_recipe
from hf_prune.search.floor import Point, Tried, by_bisection, by_optuna
from hf_prune.sites import find_sites

STAGE = {"stage": "prune", "sequence_length": 16, "criterion": "magnitude", "sparsity": 0.9}


def searched(search, floor, answer, **options):
    """What was tried, when scales up to `answer` are good."""
    tried = []

    def attempt(point):
        tried.append(Tried(point, -point.scale, point.scale, point.scale <= answer))
        return tried[-1]

    search(attempt, floor, options.pop("late", lambda: False), **options)
    return tried


def best(tried):
    return max((one.point.scale for one in tried if one.good), default=0.0)


@settings(max_examples=200, deadline=None)
@given(
    answer=st.floats(0, 1),
    start=st.none() | st.floats(0, 1),
    precision=st.sampled_from([0.005, 0.01, 0.1]),
)
def test_bisection_finds_the_answer_from_anywhere(answer, start, precision):
    floor = Floor(drop=0.1, trials=60, precision=precision)
    tried = searched(by_bisection, floor, answer, start=start)
    assert best(tried) <= answer <= best(tried) + precision + 1e-9
    assert len({one.point.scale for one in tried}) == len(tried), "nothing is tried twice"


@pytest.mark.parametrize("answer", [0.137, 0.5, 0.731])
def test_a_good_start_saves_trials(answer):
    floor = Floor(drop=0.1, trials=60)
    cold = searched(by_bisection, floor, answer)
    assert len(cold) == 1 + math.ceil(math.log2(1 / floor.precision))
    assert len(searched(by_bisection, floor, answer, start=answer)) == 3
    assert len(searched(by_bisection, floor, answer, start=answer + 0.02)) < len(cold)
    assert len(searched(by_bisection, floor, answer, start=answer - 0.02)) < len(cold)


@pytest.mark.parametrize("search", [by_bisection, by_optuna])
def test_trials_and_time_are_kept(search):
    assert len(searched(search, Floor(drop=0.1, trials=3), 0.5)) == 3
    clock = iter([False, True])
    found = searched(search, Floor(drop=0.1, trials=50), 0.5, late=lambda: next(clock))
    assert len(found) == 2, "it ends with what it has found"


def test_optuna_beats_its_first_trials_and_repeats_itself():
    floor = Floor(drop=0.1, trials=40)
    tried = searched(by_optuna, floor, 0.62, start=0.3, seed=1)
    again = searched(by_optuna, floor, 0.62, start=0.3, seed=1)
    assert tried == again
    assert tried[0].point == Point(0.3), "it starts where it is told to, untilted"
    assert 0.55 < best(tried) <= 0.62
    assert len({one.point.heads for one in tried}) > 20


def test_optuna_uses_the_tilts():
    """Only a model with heads spared can lose more than half."""

    def attempt(point):
        return Tried(point, 0.0, point.scale, point.scale <= 0.4 + 0.2 * point.heads)

    found = []
    by_optuna(
        lambda point: found.append(attempt(point)) or found[-1],
        Floor(drop=0.1, trials=80),
        lambda: False,
        seed=0,
    )
    assert best(found) > 0.5


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf_prune\[search\]'"):
        searched(by_optuna, Floor(drop=0.1), 0.5)


def test_points_weigh_sites(tiny):
    sites = find_sites(tiny("gpt2"))
    assert Point(0.5).weights(sites) is None
    weights = Point(0.5, heads=math.log(2), depth=math.log(4)).weights(sites)
    expected = [2 / 2, 1 / 2, 2, 1, 2 * 2, 2]  # attention and feed-forward of three layers
    assert list(weights.values()) == pytest.approx(expected)


def test_optuna_in_a_recipe(tiny, inputs_for):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    total = count_parameters(model)
    floor = {"drop": 0.25, "trials": 12, "search": "optuna"}
    recipe = load_recipe({"stages": [{**STAGE, "floor": floor}]})
    result = compress(model, recipe, batches, metric=lambda m: count_parameters(m) / total)
    again = compress(model, recipe, batches, metric=lambda m: count_parameters(m) / total)
    assert result.plan == again.plan
    assert 0.75 <= count_parameters(result.model) / total < 0.9
    (entry,) = result.report["pruning"]
    trials = entry["floor"]["trials"]
    assert len(trials) == 12
    assert any("heads" in trial for trial in trials)
    good = [trial["removed"] for trial in trials if trial["metric"] >= entry["floor"]["least"]]
    assert entry["sparsity"] == pytest.approx(max(good))

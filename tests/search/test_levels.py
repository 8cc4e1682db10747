"""The level search: within the budget, never worse, and the same for the same seed."""

import copy
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_prune import compress
from hf_prune.budget.allocate import allocate
from hf_prune.budget.costs import make_goal
from hf_prune.budget.levels import stage_levels
from hf_prune.recipe import load_recipe
from hf_prune.search.levels import GROWTH, SURVIVORS, LevelSearch
from hf_prune.sites import find_sites
from hf_prune.statistics.score import score

STAGE = {
    "stage": "prune",
    "sparsity": 0.6,
    "criterion": "magnitude",
    "round_to": 8,
    "sequence_length": 16,
}


@pytest.fixture
def search(tiny, inputs_for):
    def make(name="bert", seed=0, layers=2, **changes):
        model = tiny(name)
        if layers > 2:
            stack = model.bert.encoder.layer
            stack.extend(copy.deepcopy(stack[n % 2]) for n in range(layers - 2))
        (stage,) = load_recipe({"stages": [{**STAGE, **changes}]}).prune_stages
        sites = find_sites(model)
        rankings = score(model, sites, "magnitude")
        goals = [
            make_goal(sites, "parameters", stage.fraction),
            make_goal(sites, "macs", 0.55, tokens=16),
        ]
        counts = allocate(
            sites,
            rankings,
            goals,
            solver="uniform",
            levels=stage_levels(sites, stage),
        )
        batches = [inputs_for(name, s) for s in range(8)]
        return LevelSearch(model, sites, rankings, stage, goals, batches, seed), counts

    return make


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_better_and_within_all_goals(search, name):
    found, start = search(name)
    best = found.run(start, 25)
    assert all(goal.spent(best) <= goal.budget for goal in found.goals)
    assert all(best[n] in found.levels[n] for n in best)
    errors = [trial["error"] for trial in found.trials]
    accepted = [trial["error"] for trial in found.trials if trial["accepted"]]
    assert accepted == sorted(accepted, reverse=True)
    assert found.error(best) == min(errors)
    if name == "bert":  # the tiny llama has no more than a few widths to try
        assert min(errors) < errors[0], "25 trials find something better than uniform"


def test_same_seed_same_widths(search):
    one, start = search()
    two, _ = search()
    other, _ = search(seed=1)
    assert one.run(start, 8) == two.run(start, 8)
    other.run(start, 8)
    assert [t["error"] for t in one.trials] != [t["error"] for t in other.trials]


def test_ends_where_nothing_can_move(search):
    found, start = search()
    least = {name: levels[0] for name, levels in found.levels.items()}
    found.goals = [make_goal(found.sites, "parameters", 0.99)]
    assert found.change(least) is None
    assert found.cross(least, start) is None, "not even the narrower parent fits"
    assert found.run(least, 5) == least
    assert len(found.trials) == 1
    assert found.change(start) is None, "nothing fits into the budget"


FLOORS = {"min_heads": 1, "min_neurons": 8, "floors": {"*layer.0.ffn": 16}}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 999))
def test_children_are_within_goals_levels_and_parents(search, seed):
    """Whatever is changed and crossed: budgets, `round_to`, floors; and crossed between parents."""
    found, start = search(seed=seed, layers=4, **FLOORS)
    people = [start]
    for _ in range(6):
        child = found.change(random.Random(seed).choice(people))
        people += [child] if child is not None else []
    crossed = []
    for _ in range(12):
        one, two = random.Random(seed + len(crossed)).choices(people, k=2)
        child = found.cross(one, two)
        assert child is not None, "parents within the goals have a child within them"
        assert all(min(one[n], two[n]) <= child[n] <= max(one[n], two[n]) for n in child)
        crossed.append(child)
        wider = {
            n: level
            for n in child
            for level in found.levels[n]
            if child[n] < level <= max(one[n], two[n])
        }
        for name, level in wider.items():
            costs = {**child, name: level}
            assert not all(g.spent(costs) <= g.budget for g in found.goals), "budget is left"
    for counts in (*people, *crossed):
        assert list(counts) == [site.name for site in found.sites]
        assert all(goal.spent(counts) <= goal.budget for goal in found.goals)
        assert all(counts[n] in found.levels[n] for n in counts)
        for site in found.sites:
            least = 16 if site.name.endswith("layer.0.ffn") else 8
            if site.kind == "neurons":
                assert counts[site.name] % 8 == 0
                assert counts[site.name] >= least


def evolve(search, monkeypatch, trials, seed=0):
    """A search whose error is a sum over sites, and what it judged, in order."""
    found, start = search(seed=seed, layers=4, round_to=1)
    asked = []
    ideal = {n: random.Random(n).choice(levels) for n, levels in found.levels.items()}

    def error(counts):
        asked.append(dict(counts))
        return float(sum((counts[n] - ideal[n]) ** 2 for n in counts))

    monkeypatch.setattr(found, "error", error)
    return found, start, found.run(start, trials), asked


@pytest.mark.parametrize("seed", range(4))
def test_none_is_judged_twice_and_the_best_is_returned(search, monkeypatch, seed):
    found, start, best, asked = evolve(search, monkeypatch, 60, seed)
    keys = [tuple(counts.items()) for counts in asked]
    assert len(set(keys)) == len(keys) == len(found.trials)
    assert asked[0] == start
    errors = [trial["error"] for trial in found.trials]
    assert best == asked[errors.index(min(errors))]
    assert min(errors) < errors[0]
    crossed = [trial["crossed"] for trial in found.trials]
    assert not any(crossed[: GROWTH + 1])
    assert 0 < sum(crossed) < len(crossed) - GROWTH - 1


def test_few_trials_change_the_best_only(search, monkeypatch):
    """Then it is a hill climb: every child differs in two sites from the best so far."""
    found, start, _, asked = evolve(search, monkeypatch, GROWTH)
    best, least = start, found.trials[0]["error"]
    for counts, trial in zip(asked[1:], found.trials[1:], strict=True):
        assert len([n for n in counts if counts[n] != best[n]]) == 2
        assert trial["crossed"] == 0.0
        assert trial["accepted"] == float(trial["error"] < least)
        if trial["accepted"]:
            best, least = counts, trial["error"]


def test_parents_are_the_best_of_all_that_were_judged(search):
    found, _ = search()
    judged = [(float(i), {"x": i}) for i in range(20)]
    drawn = [found._parent(judged)["x"] for _ in range(400)]
    assert set(drawn) == set(range(SURVIVORS))
    assert drawn.count(0) > drawn.count(SURVIVORS - 1)
    assert found._parent(judged[:1]) == {"x": 0}


def test_in_a_recipe(tiny, inputs_for):
    batches = [inputs_for("bert", s) for s in range(8)]
    stage = {**STAGE, "search_trials": 16, "round_to": 1}
    result = compress(tiny("bert"), {"stages": [stage]}, batches)
    (entry,) = result.report["pruning"]
    assert 1 < len(entry["search"]) <= 17
    assert any(trial["crossed"] for trial in entry["search"])
    assert entry["met"]
    assert entry["seconds"]["search"] > 0

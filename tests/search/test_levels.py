"""The level search: within the budget, never worse, and the same for the same seed."""

import pytest

from hf_prune import compress
from hf_prune.budget.allocate import allocate
from hf_prune.budget.costs import make_goal
from hf_prune.budget.levels import stage_levels
from hf_prune.recipe import load_recipe
from hf_prune.search.levels import LevelSearch
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
    def make(name="bert", seed=0, **changes):
        model = tiny(name)
        (stage,) = load_recipe({"stages": [{**STAGE, **changes}]}).prune_stages
        sites = find_sites(model)
        rankings = score(model, sites, "magnitude")
        goals = [
            make_goal(sites, "parameters", stage.fraction),
            make_goal(sites, "macs", 0.55, sequence_length=16),
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
    assert found.run(least, 5) == least
    assert len(found.trials) == 1
    assert found.change(start) is None, "nothing fits into the budget"


def test_in_a_recipe(tiny, inputs_for):
    batches = [inputs_for("bert", s) for s in range(8)]
    stage = {**STAGE, "search_trials": 12}
    result = compress(tiny("bert"), {"stages": [stage]}, batches)
    (entry,) = result.report["pruning"]
    assert 1 < len(entry["search"]) <= 13
    assert entry["met"]
    assert entry["seconds"]["search"] > 0

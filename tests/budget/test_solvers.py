"""Solvers: never over the budget, and more budget keeps more."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.budget.solvers import SOLVERS, decide, get_solver, ranks, select
from hf_prune.errors import ConfigError
from hf_prune.recipe import Prune
from hf_prune.sites import find_sites

solvers = pytest.mark.parametrize("solver", sorted(SOLVERS))
SCORE = st.integers(-3, 6).map(float) | st.floats(-1e6, 1e6)


@st.composite
def problems(draw):
    """Some sites, their scores (with ties), costs, floors, and what everything costs."""
    sites, scores, costs = [], {}, {}
    for index in range(draw(st.integers(1, 4))):
        name = f"site{index}"
        values = draw(st.lists(SCORE, min_size=1, max_size=7))
        kind = draw(st.sampled_from(["heads", "neurons"]))
        sites.append(SimpleNamespace(name=name, kind=kind, units=len(values)))
        scores[name] = torch.tensor(values, dtype=torch.float64)
        costs[name] = draw(st.integers(1, 40))
    floors = draw(st.dictionaries(st.sampled_from(["heads", "neurons"]), st.integers(1, 3)))
    return sites, scores, costs, floors


def spent(kept, costs):
    return sum(len(site.kept) * costs[name] for name, site in kept.items())


def floor_cost(sites, costs, floors):
    return sum(min(s.units, floors.get(s.kind, 1)) * costs[s.name] for s in sites)


@solvers
@settings(max_examples=100, deadline=None)
@given(problem=problems(), budget=st.integers(-10, 1200), more=st.integers(0, 300))
def test_within_budget_and_nested(solver, problem, budget, more):
    sites, scores, costs, floors = problem
    total = sum(site.units * costs[site.name] for site in sites)
    small, large = (
        select(sites, scores, costs, solver=solver, budget=b, floors=floors)
        for b in (budget, budget + more)
    )
    least = floor_cost(sites, costs, floors)
    assert spent(small, costs) <= max(budget, least)
    if budget <= least:
        assert spent(small, costs) == least
    if budget >= total:
        assert spent(small, costs) == total
    elif budget >= least:  # nothing more of one unit would have been free
        assert spent(small, costs) > budget - max(costs.values())
    for site in sites:
        assert set(small[site.name].kept) <= set(large[site.name].kept)
        assert len(small[site.name].kept) >= min(site.units, floors.get(site.kind, 1))
        assert (small[site.name].units, small[site.name].kind) == (site.units, site.kind)


@solvers
@settings(max_examples=60, deadline=None)
@given(problem=problems(), budget=st.integers(0, 600))
def test_the_best_of_each_site_stay(solver, problem, budget):
    sites, scores, costs, floors = problem
    kept = select(sites, scores, costs, solver=solver, budget=budget, floors=floors)
    for site in sites:
        order = sorted(range(site.units), key=lambda u: (-scores[site.name][u].item(), u))
        count = len(kept[site.name].kept)
        assert kept[site.name].kept == tuple(sorted(order[:count])), "equal scores: first index"


def test_global_spends_where_a_unit_of_cost_brings_most():
    sites = [SimpleNamespace(name=n, kind="heads", units=2) for n in ("a", "b")]
    scores = {"a": torch.tensor([10.0, 9.0]), "b": torch.tensor([3.0, 2.0])}
    costs = {"a": 10, "b": 1}
    kept = select(sites, scores, costs, solver="global", budget=12, floors={})
    assert {n: s.kept for n, s in kept.items()} == {"a": (0,), "b": (0, 1)}


def test_uniform_takes_the_same_fraction():
    sites = [SimpleNamespace(name=n, kind="heads", units=u) for n, u in (("a", 4), ("b", 8))]
    scores = {"a": torch.arange(4.0) * 100, "b": torch.arange(8.0)}
    kept = select(sites, scores, {"a": 1, "b": 1}, solver="uniform", budget=6, floors={})
    assert {n: s.kept for n, s in kept.items()} == {"a": (2, 3), "b": (4, 5, 6, 7)}


def test_ranks_of_ties():
    assert ranks(torch.tensor([1.0, 3.0, 1.0, 3.0])).tolist() == [2, 0, 3, 1]


def test_nothing_to_select():
    assert select([], {}, {}, solver="global", budget=5, floors={}) == {}


def test_unknown_solver():
    with pytest.raises(ConfigError, match=r"unknown solver 'globl'; did you mean 'global'\?"):
        get_solver("globl")


@pytest.mark.parametrize("cost", ["parameters", "macs"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
@solvers
def test_decide_removes_what_was_asked(tiny, solver, cost, sparsity):
    model = tiny("bert")
    sites = find_sites(model)
    scores = {
        s.name: torch.rand(s.units, generator=torch.Generator().manual_seed(1)) for s in sites
    }
    stage = Prune(sparsity=sparsity, solver=solver, cost=cost, sequence_length=10)
    result = decide(sites, scores, stage, model_type="bert")
    assert result.met
    assert result.plan.model_type == "bert"
    largest = 1024 + 24 if cost == "parameters" else 10 * 1024 + 1600
    assert sparsity * result.total <= result.removed < sparsity * result.total + 1 + largest
    data = result.to_dict()
    assert data["sparsity"] == result.removed / result.total
    assert data["asked_to_remove"] == result.asked
    if not sparsity:
        assert result.removed == 0


def test_what_cannot_be_met_is_said(tiny):
    sites = find_sites(tiny("bert"))
    scores = {site.name: torch.ones(site.units) for site in sites}
    stage = Prune(sparsity=0.9, min_heads=3, min_neurons=40)
    result = decide(sites, scores, stage, model_type="bert")
    assert not result.met
    assert result.to_dict()["met"] is False
    assert {len(s.kept) for s in result.plan.sites.values()} == {3, 40}
    assert result.removed < result.asked


def test_another_base(tiny):
    """The fraction is one of all that the layers hold, not only of what may go."""
    sites = find_sites(tiny("bert"))
    scores = {site.name: torch.ones(site.units) for site in sites}
    result = decide(sites, scores, Prune(sparsity=0.25), model_type="bert", base=12_000)
    assert (result.total, result.asked) == (12_000, 3_000)
    assert result.removed >= 3_000


def test_asked_is_the_exact_fraction():
    """A fraction such as 0.07 of 100 is 7: the float product is a little more than that."""
    site = SimpleNamespace(
        name="a", kind="neurons", units=100, parameters=1, macs_per_token=0, attention_width=0
    )
    removed = {}
    for percent in range(1, 100):
        stage = Prune(sparsity=percent / 100)
        result = decide([site], {"a": torch.arange(100.0)}, stage, model_type="bert")
        removed[percent] = result.removed
    assert {k: v for k, v in removed.items() if k != v} == {}

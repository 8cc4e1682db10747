"""The exchange of units, against every swap and every set that there is on tiny sites."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune import compress
from hf_prune.budget.prepare import prepare
from hf_prune.criteria import exchange as module
from hf_prune.criteria.exchange import exchange
from hf_prune.criteria.obs import block_fisher
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import Prune, load_recipe
from hf_prune.sites import find_sites

STAGE = {"stage": "prune", "solver": "mask_search", "criterion": "block_fisher"}


def random_fisher(units, examples, seed):
    """A Fisher matrix whose units have much in common, some of them with opposite signs."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(examples, units, generator=generator, dtype=torch.float64)
    shared = torch.randn(examples, 1, generator=generator, dtype=torch.float64)
    gradients += 2 * shared * torch.randn(1, units, generator=generator, dtype=torch.float64)
    return gradients.T @ gradients / examples


def lost(gone, matrix):
    """`1_S^T F 1_S`, entry by entry."""
    units = [unit for unit, is_gone in enumerate(gone) if is_gone]
    return sum(float(matrix[i, j]) for i in units for j in units)


def mask(units, chosen):
    result = torch.zeros(units, dtype=torch.bool)
    result[list(chosen)] = True
    return result


def best_of_all(units, count, matrix):
    sets = itertools.combinations(range(units), count)
    return min(lost(mask(units, chosen), matrix) for chosen in sets)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), units=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_no_swap_is_left_that_wins(data, units, seed):
    count = data.draw(st.integers(0, units))
    matrix = random_fisher(units, data.draw(st.integers(1, 12)), seed)
    start = mask(units, data.draw(st.permutations(range(units)))[:count])
    found = exchange(start, matrix)
    assert int(found.sum()) == count
    error = lost(found, matrix)
    assert error <= lost(start, matrix) + 1e-9
    for i in found.nonzero().flatten().tolist():
        for j in (~found).nonzero().flatten().tolist():
            other = found.clone()
            other[i], other[j] = False, True
            assert error <= lost(other, matrix) + 1e-6 * (1 + abs(error))


def test_close_to_the_best_of_all_sets():
    """From the diagonal's choice, which misses what pairs have in common by far."""
    starts, ends, bests = 0.0, 0.0, 0.0
    for seed in range(30):
        matrix = random_fisher(10, 30, seed)
        gone = mask(10, torch.argsort(matrix.diagonal())[:5].tolist())
        starts += lost(gone, matrix)
        ends += lost(exchange(gone, matrix), matrix)
        bests += best_of_all(10, 5, matrix)
    assert ends <= 1.2 * bests, "a local optimum: no single swap wins"
    assert starts > 1.8 * ends, "there was something to win"


def test_twins_do_not_go_together_and_opposites_do():
    """Units 0 and 1 do the same; 2 and 3 cancel: without both nothing is lost."""
    gradients = torch.tensor([[1.0, 1.0, 2.0, -2.0]], dtype=torch.float64)
    matrix = gradients.T @ gradients
    assert mask(4, [0, 1]).tolist() == [True, True, False, False]
    assert exchange(mask(4, [0, 1]), matrix).tolist() == [False, False, True, True]
    ranking = Ranking.with_swaps(matrix)
    assert ranking.kept(2) == (0, 1)
    assert ranking.error_of(2) == 0
    assert Ranking.from_scores(matrix.diagonal()).kept(2) == (2, 3)


def test_many_units_are_tried_a_few_at_a_time(monkeypatch):
    matrix = random_fisher(40, 60, 1)
    start = mask(40, range(20))
    whole = lost(exchange(start, matrix), matrix)
    monkeypatch.setattr(module, "CANDIDATES", 5)
    few = lost(exchange(start, matrix), matrix)
    assert few < 0.5 * lost(start, matrix)
    assert few <= 1.5 * whole


def test_rankings_carry_pairs_only_where_they_are_known(tiny):
    matrix = random_fisher(4, 9, 0)
    found = block_fisher(torch.zeros(4, 2), projected_gate_fisher=matrix)
    assert torch.equal(found.pairs, matrix)
    assert not found.swaps
    sites = find_sites(tiny("bert"), ["heads"])
    stage = Prune(sparsity=0.5, solver="mask_search", criterion="block_fisher")
    ready = prepare(sites, {site.name: found for site in sites}, stage)
    again = prepare(sites, ready.rankings, stage)
    for site in sites:
        for count in range(5):
            kept = ready.rankings[site.name].kept(count)
            assert kept == again.rankings[site.name].kept(count)
            assert len(kept) == count
    plain = {site.name: Ranking.from_scores(torch.ones(4)) for site in sites}
    with pytest.raises(ConfigError, match="rankings with pairs"):
        prepare(sites, plain, stage)


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_mask_search_in_a_recipe(tiny, inputs_for, name):
    model, batches = tiny(name), [inputs_for(name, s) for s in range(4)]
    units = ["heads", "neurons"] if name != "mixtral" else ["expert_neurons"]
    stage = {**STAGE, "units": units, "sparsity": 0.4, "sequence_length": 8}
    result = compress(model, {"stages": [stage]}, batches)
    (entry,) = result.report["pruning"]
    assert entry["met"]
    greedy = compress(model, {"stages": [{**stage, "solver": "global"}]}, batches)
    diagonal = compress(
        model, {"stages": [{**stage, "solver": "global", "criterion": "fisher"}]}, batches
    )
    widths = [
        {site: len(plan.kept) for site, plan in each.plan.sites.items()}
        for each in (result, diagonal)
    ]
    assert widths[0] == widths[1], "the diagonal chooses the widths"
    assert result.plan != diagonal.plan, "and pairs the units"
    assert entry["error"] <= diagonal.report["pruning"][0]["error"] * 10
    assert greedy.report["pruning"][0]["met"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"criterion": "kfac_obs"}, "'kfac_obs' does not say: write criterion: block_fisher"),
        ({"schedule": {}}, "mask_search is for one shot"),
    ],
)
def test_what_mask_search_refuses(tiny, inputs_for, change, text):
    with pytest.raises(ConfigError, match=text):
        compress(
            tiny("bert"),
            load_recipe({"stages": [{**STAGE, "sparsity": 0.5, **change}]}),
            [inputs_for("bert", s) for s in range(3)],
        )

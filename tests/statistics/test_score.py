"""Scores of all sites, and the weights that are refused."""

import pytest
import torch
from tinies import CORE

from hf_prune import criteria
from hf_prune.criteria import CRITERIA, needs
from hf_prune.errors import ConfigError, NumericsError
from hf_prune.sites import base_model, find_sites, gate_weight
from hf_prune.statistics.collect import collect
from hf_prune.statistics.score import check_weights, score


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_on_every_family(name, criterion, tiny, inputs_for):
    model = tiny(name)
    sites = find_sites(model)
    statistics = collect(model, sites, [inputs_for(name)], needs(CRITERIA[criterion]))
    scores = score(model, sites, criterion, statistics)
    assert list(scores) == [site.name for site in sites]
    for site in sites:
        ranking = scores[site.name]
        assert sorted(ranking.order.tolist()) == list(range(site.units))
        assert ranking.errors.shape == (site.units + 1,)
        assert ranking.errors.dtype == torch.float64
        assert (ranking.errors.diff() >= 0).all()
        assert ranking.errors[-1] > 0
    again = score(model, sites, criterion, statistics)
    for name, ranking in scores.items():
        assert torch.equal(ranking.order, again[name].order)
        assert torch.equal(ranking.errors, again[name].errors)


def test_magnitude_reads_the_gate(tiny):
    model = tiny("gpt2")
    sites = find_sites(model)
    scores = score(model, sites, "magnitude")
    for site in sites:
        expected = gate_weight(base_model(model), site).abs().sum(dim=1).double()
        ranking = scores[site.name]
        torch.testing.assert_close(ranking.errors.diff(), expected[ranking.order])


def test_random_has_a_stream_for_each_site_and_seed(tiny):
    model = tiny("bert")
    sites = find_sites(model)
    one, two = (score(model, sites, "random", seed=s) for s in (0, 1))
    values = [tuple(one[s.name].errors.tolist()) for s in sites if s.kind == "heads"]
    assert len(set(values)) == len(values)
    assert not torch.equal(one[sites[0].name].errors, two[sites[0].name].errors)
    alone = score(model, sites[2:3], "random")
    assert torch.equal(alone[sites[2].name].errors, one[sites[2].name].errors)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tiny, value):
    model = tiny("gpt2")
    check_weights(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[2, 3:6] = value
    with pytest.raises(NumericsError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight has 3 values"):
        check_weights(model)


def test_a_score_that_is_not_finite(tiny, monkeypatch):
    monkeypatch.setitem(criteria.CRITERIA, "broken", lambda weight: weight.sum(1) / 0)
    model = tiny("bert")
    with pytest.raises(
        NumericsError, match=r"layer\.0\.attention: criterion 'broken' gave a score"
    ):
        score(model, find_sites(model), "broken")


def test_unknown_criterion(tiny):
    model = tiny("bert")
    with pytest.raises(ConfigError, match="unknown criterion 'fischer'; did you mean 'fisher'"):
        score(model, find_sites(model), "fischer")

"""Sensitivity curves against masking by hand, and rank correlations against scipy."""

import pytest
import torch
from scipy.stats import spearmanr

from hf_prune.analysis import analyse_sensitivity, rank_correlation
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.gates.plans import close_gates
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.statistics.score import score


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_curves_are_those_of_masking_each_site(tiny, inputs_for, logits, name):
    model, batch = tiny(name), inputs_for(name)
    found = analyse_sensitivity(model, [batch], ["magnitude", "taylor"], fractions=(0.0, 0.5))
    dense = logits(model, batch)
    rankings = score(model, find_sites(model), "magnitude")
    for site in find_sites(model):
        kept = rankings[site.name].kept(site.units - round(0.5 * site.units))
        plan = Plan(name, {site.name: SitePlan(site.kind, site.units, kept)})
        gates = close_gates(model, plan)
        masked = logits(model, batch)
        with torch.no_grad():
            loss = float(model(**batch).loss)
        gates.remove()
        p, q = dense.softmax(-1), masked.softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        change = masked - dense
        error = (change - change.mean(-1, keepdim=True)).square().mean()
        curve = found.curves[site.name]
        assert curve["kl"] == pytest.approx([0, float(kl)], rel=1e-3, abs=1e-6)
        assert curve["logit_error"] == pytest.approx([0, float(error)], rel=1e-3, abs=1e-7)
        assert curve["loss"][1] == pytest.approx(loss, rel=1e-5)
    assert torch.equal(logits(model, batch), dense)


def halves(batch):
    """Of unlike numbers of counted tokens."""
    return [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, None))]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_losses_are_weighted_by_the_labels_that_count(tiny, inputs_for, name):
    model, batch = tiny(name), inputs_for(name)
    if name == "gpt2":
        batch["labels"][1:, 3:] = -100
    whole = analyse_sensitivity(model, [batch], ["magnitude"], fractions=(0.5,))
    parts = analyse_sensitivity(model, halves(batch), ["magnitude"], fractions=(0.5,))
    for site, curve in whole.curves.items():
        for key, values in curve.items():
            assert parts.curves[site][key] == pytest.approx(values, rel=1e-4, abs=1e-8), key


def test_curves_are_of_the_data_of_all_processes(tiny, inputs_for, monkeypatch):
    model, batch = tiny("bert"), inputs_for("bert")
    sums = []

    def other_process(value):
        sums.append(value.clone())
        return value + sums[0] if len(sums) == 2 else value

    whole = analyse_sensitivity(model, [batch], ["magnitude"], fractions=(0.5,))
    monkeypatch.setattr("hf_prune.analysis.sum_over_processes", other_process)
    for half in halves(batch):
        found = analyse_sensitivity(model, [half], ["magnitude"], fractions=(0.5,))
    for site, curve in whole.curves.items():
        for key, values in curve.items():
            assert found.curves[site][key] == pytest.approx(values, rel=1e-4, abs=1e-8), key


def test_scores_and_agreement(tiny, inputs_for):
    model = tiny("bert")
    found = analyse_sensitivity(model, [inputs_for("bert")], ["magnitude", "random"])
    assert found.agreement["magnitude"]["magnitude"] == pytest.approx(1)
    assert found.agreement["magnitude"]["random"] == found.agreement["random"]["magnitude"]
    assert abs(found.agreement["magnitude"]["random"]) < 0.9
    for site in find_sites(model):
        assert len(found.scores["random"][site.name]) == site.units
        assert min(found.scores["magnitude"][site.name]) > 0
    assert set(found.to_dict()) == {"criterion", "fractions", "curves", "scores", "agreement"}


def test_rank_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(30, generator=generator) for _ in range(2))
    expected = spearmanr(one.numpy(), two.numpy()).statistic
    found = rank_correlation(Ranking.from_scores(one), Ranking.from_scores(two))
    assert found == pytest.approx(expected)
    single = Ranking.from_scores(torch.ones(1))
    assert rank_correlation(single, single) == 1


def test_no_criterion(tiny, inputs_for):
    with pytest.raises(ConfigError, match="at least one criterion"):
        analyse_sensitivity(tiny("bert"), [inputs_for("bert")], [])

"""Criteria: against slow loops, and blind to the order of the units."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.criteria import CRITERIA, STATISTICS, criterion, get_criterion, needs
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import load_recipe

U, D, E = 5, 3, 4
RANDOM = {"random", "random_by_weight"}
TOGETHER = {"obs", "kfac_obs", "kfac_obs_label", "kfac_obs_sampled", "block_fisher"}
names = pytest.mark.parametrize("name", sorted(set(CRITERIA) - TOGETHER))
judged = pytest.mark.parametrize("name", sorted(set(CRITERIA) - TOGETHER - RANDOM))


def arguments(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        "gate_grad": torch.rand(U, generator=generator),
        "projected_fisher": torch.rand(U, generator=generator),
        "input_norm": torch.rand(U, D, generator=generator),
        "gate_grad_signed": torch.randn(U, generator=generator),
        "gate_square": torch.rand(U, generator=generator),
        "weight_grad_square": torch.rand(U, E * D, generator=generator),
    }
    weight = torch.randn(U, E * D, generator=generator)
    return weight, {key: made[key] for key in needs(CRITERIA[name]) if key != "generator"}


def by_norm(entries, unit, statistics):
    norms = statistics["input_norm"][unit].tolist()
    total = sum(abs(entries[e * D + d]) * norms[d] for e in range(E) for d in range(D))
    return total


def lamp(weight, unit):
    norms = [sum(w * w for w in row) for row in weight.tolist()]
    return norms[unit] / sum(n for n in norms if n >= norms[unit])


def damage(entries, unit, statistics):
    h = statistics["weight_grad_square"][unit].tolist()
    return sum(a * w * w for a, w in zip(h, entries, strict=True)) / 2


LOOPS = {
    "magnitude": lambda w, u, s: sum(map(abs, w[u].tolist())),
    "magnitude_l2": lambda w, u, s: sum(x * x for x in w[u].tolist()),
    "magnitude_normalized": lambda w, u, s: (
        sum(map(abs, w[u].tolist())) / max(max(map(abs, row)) for row in w.tolist())
    ),
    "lamp": lambda w, u, s: lamp(w, u),
    "activation_norm": lambda w, u, s: by_norm(w[u].tolist(), u, s),
    "taylor": lambda w, u, s: s["gate_grad"][u].item(),
    "taylor_batch": lambda w, u, s: abs(s["gate_grad_signed"][u].item()),
    "structural_sensitivity": lambda w, u, s: (
        s["gate_grad"][u].item() / sum(g * g for g in s["gate_grad"].tolist()) ** 0.5
    ),
    "gradient_norm": lambda w, u, s: sum(s["weight_grad_square"][u].tolist()),
    "obd": lambda w, u, s: damage(w[u].tolist(), u, s),
    "fisher": lambda w, u, s: s["projected_fisher"][u].item(),
    "fisher_label": lambda w, u, s: s["gate_square"][u].item(),
}
"""The definitions, one unit and one weight at a time."""


@judged
def test_against_a_loop(name):
    weight, statistics = arguments(name)
    found = CRITERIA[name](weight, **statistics)
    slow = torch.tensor([LOOPS[name](weight, unit, statistics) for unit in range(U)])
    torch.testing.assert_close(found.float(), slow, atol=1e-6, rtol=1e-6)


@judged
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(U)), seed=st.integers(0, 99))
def test_permuting_units_permutes_scores(name, order, seed):
    weight, statistics = arguments(name, seed)
    plain = CRITERIA[name](weight, **statistics)
    moved = CRITERIA[name](
        weight[order],
        **{key: value[order] for key, value in statistics.items()},
    )
    torch.testing.assert_close(moved, plain[order])


@names
def test_half_precision_scores_in_float32(name):
    weight, statistics = arguments(name)
    if name in RANDOM:
        statistics = {"generator": torch.Generator().manual_seed(0)}
    scores = CRITERIA[name](1e4 * weight.half(), **statistics)
    assert scores.dtype in (torch.float32, torch.float64)
    assert scores.shape == (U,)
    assert scores.isfinite().all()


def test_random_repeats():
    weight = torch.zeros(U, 7)
    one, two, other = (
        CRITERIA["random"](weight, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(set(one.tolist())) == U
    assert ((one >= 0) & (one < 7)).all()


def test_larger_units_are_kept_more_often():
    weight = torch.tensor([[1.0], [4.0], [0.0]])
    generator = torch.Generator().manual_seed(0)
    first = [
        int(CRITERIA["random_by_weight"](weight, generator=generator).argmax()) for _ in range(4000)
    ]
    share = first.count(1) / len(first)
    assert first.count(2) == 0
    assert abs(share - 0.8) < 0.03, "drawn with probability by weight"


def test_ranking_of_ties_and_of_negative_scores():
    ranking = Ranking.from_scores(torch.tensor([1.0, 3.0, 1.0, -2.0]))
    assert ranking.order.tolist() == [3, 2, 0, 1]
    assert ranking.errors.tolist() == [0, 0, 1, 2, 5]
    assert ranking.kept(2) == (0, 1)
    assert ranking.kept(0) == ()
    assert ranking.error_of(1) == 2
    with pytest.raises(ValueError, match="U \\+ 1 points"):
        Ranking(torch.arange(3), torch.zeros(3))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_asks_for_what_there_is(name):
    assert set(needs(CRITERIA[name])) <= set(STATISTICS)
    assert CRITERIA[name].__doc__


def test_a_criterion_that_asks_for_more_is_refused():
    def hungry(weight, *, phase_of_the_moon):
        return weight

    with pytest.raises(ConfigError, match="criterion hungry: no statistic 'phase_of_the_moon'"):
        criterion(hungry)
    assert "hungry" not in CRITERIA


def test_unknown_criterion():
    with pytest.raises(
        ConfigError, match=r"unknown criterion 'tailor'; did you mean 'taylor'.*fis"
    ):
        get_criterion("tailor")


def test_the_default_needs_no_labels_and_no_draws():
    (stage,) = load_recipe({"stages": [{"stage": "prune", "sparsity": 0.5}]}).prune_stages
    assert stage.criterion == "kfac_obs"
    assert needs(CRITERIA[stage.criterion]) == ("hessian", "output_gradient")
    assert "labels" not in "".join(STATISTICS[name] for name in ("hessian", "output_gradient"))
    told = needs(CRITERIA["kfac_obs_label"])
    assert all("needs labels" in STATISTICS[name] for name in told)
    drawn = needs(CRITERIA["kfac_obs_sampled"])
    assert not any("needs labels" in STATISTICS[name] for name in drawn)


SPLIT = ("magnitude", "magnitude_l2", "activation_norm", "gradient_norm", "obd")


@pytest.mark.parametrize("name", SPLIT)
def test_a_unit_counts_as_what_it_consists_of(name):
    """Two units seen as one have the sum of their scores: no head counts as a single neuron."""
    weight, statistics = arguments(name)
    narrow = CRITERIA[name](weight[:4], **{k: v[:4] for k, v in statistics.items()})
    if name == "activation_norm":
        norms = statistics["input_norm"][:4].view(2, 2 * D)
        columns = weight[:4].view(2, 2, E, D).transpose(1, 2).reshape(2, -1)
        wide = CRITERIA[name](columns, input_norm=norms)
    else:
        merged = {k: v[:4].reshape(2, -1) for k, v in statistics.items()}
        wide = CRITERIA[name](weight[:4].reshape(2, -1), **merged)
    torch.testing.assert_close(wide, narrow.view(2, 2).sum(dim=1))

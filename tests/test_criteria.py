"""Criteria: against slow loops, and blind to the order of the units."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.criteria import CRITERIA, STATISTICS, criterion, get_criterion, needs
from hf_prune.errors import ConfigError

U, D, E = 5, 3, 4
names = pytest.mark.parametrize("name", sorted(CRITERIA))


def arguments(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        "gate_grad": torch.rand(U, generator=generator),
        "projected_fisher": torch.rand(U, generator=generator),
        "input_norm": torch.rand(U, D, generator=generator),
    }
    weight = torch.randn(U, E * D, generator=generator)
    return weight, {key: made[key] for key in needs(CRITERIA[name]) if key != "generator"}


def loop(name, weight, statistics):
    """The definition, one unit and one weight at a time."""
    scores = []
    for unit in range(U):
        entries = [weight[unit, i].item() for i in range(E * D)]
        if name == "magnitude":
            scores.append(sum(abs(w) for w in entries) / len(entries))
        elif name == "magnitude_l2":
            scores.append((sum(w * w for w in entries) / len(entries)) ** 0.5)
        elif name == "activation_norm":
            norms = statistics["input_norm"][unit].tolist()
            total = sum(abs(entries[e * D + d]) * norms[d] for e in range(E) for d in range(D))
            scores.append(total / (E * D))
        elif name == "taylor":
            scores.append(statistics["gate_grad"][unit].item())
        elif name == "fisher":
            scores.append(statistics["projected_fisher"][unit].item())
        else:
            raise NotImplementedError(f"write the loop of the new criterion {name!r}")
    return torch.tensor(scores)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
def test_against_a_loop(name):
    weight, statistics = arguments(name)
    found = CRITERIA[name](weight, **statistics)
    torch.testing.assert_close(found, loop(name, weight, statistics), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(U)), seed=st.integers(0, 99))
def test_permuting_units_permutes_scores(name, order, seed):
    weight, statistics = arguments(name, seed)
    plain = CRITERIA[name](weight, **statistics)
    moved = CRITERIA[name](weight[order], **{k: v[order] for k, v in statistics.items()})
    torch.testing.assert_close(moved, plain[order])


@names
def test_half_precision_scores_in_float32(name):
    weight, statistics = arguments(name)
    if name == "random":
        statistics = {"generator": torch.Generator().manual_seed(0)}
    scores = CRITERIA[name](1e4 * weight.half(), **statistics)
    assert scores.dtype in (torch.float32, torch.float64)
    assert scores.shape == (U,)
    assert scores.isfinite().all()


def test_random_repeats():
    weight = torch.zeros(U, 1)
    one, two, other = (
        CRITERIA["random"](weight, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(set(one.tolist())) == U
    assert ((one >= 0) & (one < 1)).all()


@names
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

"""Single weights: exact counts, the smallest first, and nothing that is shared."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_prune.errors import ConfigError, NumericsError, PlanError
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import (
    apply_masks_,
    count_kept,
    magnitude_masks,
)


def matrices(seed, shapes, ties):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return {f"w{i}": (m * 2).round() if ties else m for i, m in enumerate(made)}


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 99),
    shapes=SHAPES,
    ties=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875]),
    solver=st.sampled_from(["uniform", "global"]),
)
def test_exact_counts_and_the_smallest_go(seed, shapes, ties, sparsity, solver):
    weights = matrices(seed, shapes, ties)
    masks = magnitude_masks(weights, sparsity, solver)
    assert {n: m.shape for n, m in masks.items()} == {n: w.shape for n, w in weights.items()}
    groups = [[name] for name in weights] if solver == "uniform" else [list(weights)]
    for names in groups:
        values = torch.cat([weights[n].abs().flatten() for n in names])
        kept = torch.cat([masks[n].flatten() for n in names])
        assert int((~kept).sum()) == math.ceil(sparsity * len(values))
        if kept.any() and not kept.all():
            assert values[~kept].max() <= values[kept].min()


def test_ties_go_in_the_order_of_their_indices():
    masks = magnitude_masks({"w": torch.ones(2, 4)}, 0.5)
    assert masks["w"].tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("solver", ["uniform", "global"])
def test_count_is_the_exact_fraction(solver):
    """A fraction such as 0.07 of 100 is 7: the float product is a little more than that."""
    weights = {"w": torch.arange(100.0).view(10, 10)}
    removed = {
        percent: int((~magnitude_masks(weights, percent / 100, solver)["w"]).sum())
        for percent in range(1, 100)
    }
    assert {k: v for k, v in removed.items() if k != v} == {}


def test_finds_each_matrix_once(tiny):
    model = tiny("gpt2")
    found = find_weights(model)
    assert "lm_head.weight" not in found, "it is the embedding"
    assert len(found) == 3 * 4
    assert all(parameter.ndim == 2 for parameter in found.values())
    assert len(find_weights(model, ["*.mlp.*"])) == 3 * 2


def test_any_module():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer, layer, nn.LayerNorm(3))
    assert list(find_weights(model)) == ["0.weight", "1.weight"]
    assert list(find_weights(layer)) == ["weight"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_zeros_are_exact(tiny, name):
    model = tiny(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = magnitude_masks(find_weights(model), 0.5, "global")
    apply_masks_(model, masks)
    for key, parameter in model.named_parameters():
        mask = masks.get(key, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, before[key] * mask), key
    assert count_kept(masks) == {k: int((before[k] * m != 0).sum()) for k, m in masks.items()}


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, 50, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ConfigError, match=rf"sparsity={sparsity:g} is outside \[0, 1\)"):
        magnitude_masks({"w": torch.ones(2, 2)}, sparsity)


def test_unknown_solver():
    with pytest.raises(ConfigError, match="unknown solver 'unifrm' for weights; did you mean 'uni"):
        magnitude_masks({"w": torch.ones(2, 2)}, 0.5, "unifrm")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    with pytest.raises(NumericsError, match="bad has values that are not finite"):
        magnitude_masks({"good": torch.ones(2), "bad": torch.tensor([1.0, value])}, 0.5)


def test_masks_of_another_model():
    model = nn.Linear(3, 2)
    with pytest.raises(PlanError, match=r"x: the mask has shape \[2, 3\], the model has nothing"):
        apply_masks_(model, {"x": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(PlanError, match=r"shape \[3, 2\], the model has \[2, 3\]"):
        apply_masks_(model, {"weight": torch.ones(3, 2, dtype=torch.bool)})

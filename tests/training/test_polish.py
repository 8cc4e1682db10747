"""Norms and biases alone are trained, and only kept where held-out examples say so."""

import pytest
import torch

from hf_prune import compress, split
from hf_prune.errors import DataError
from hf_prune.surgery.dense import set_apart
from hf_prune.training.polish import polish_
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks
from hf_prune.weights.stage import prune_stage_


@pytest.fixture
def case(tiny, inputs_for):
    """`case(name)`: a sparse model, its dense original, batches, and masks."""

    def make(name):
        dense, model = tiny(name), tiny(name)
        masks = magnitude_masks(find_weights(model), 0.6)
        apply_masks_(model, masks)
        batches = [inputs_for(name, seed, (9, 6, 4, 7) * 8) for seed in range(4)]
        return model, dense, batches, masks

    return make


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_it_comes_nearer_on_examples_it_has_not_seen(name, case, inputs_for, logits):
    model, dense, batches, masks = case(name)
    other = inputs_for(name, 77, (9, 6, 4, 7) * 8)

    def gap():
        ours, theirs = (torch.log_softmax(logits(m, other), -1) for m in (model, dense))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    state, before = {k: v.clone() for k, v in model.state_dict().items()}, gap()
    result = polish_(model, dense, *set_apart(dense, batches), steps=24, learning_rate=5e-3)
    assert result["kept"]
    assert result["after"] < result["before"]
    assert gap() < 0.95 * before
    for key, value in model.state_dict().items():
        assert value.ndim == 1 or torch.equal(value, state[key]), key
    for key, mask in masks.items():
        assert not model.get_parameter(key)[~mask].any()
    assert all(p.grad is None for p in model.parameters())


def test_what_makes_it_worse_is_taken_back(case):
    model, dense, batches, _ = case("bert")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    result = polish_(model, dense, *set_apart(dense, batches), steps=4, learning_rate=50.0)
    assert not result["kept"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_padding_is_never_counted(case):
    found = []
    for token in (0, 77):
        model, dense, batches, _ = case("bert")
        changed = [
            {**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, token)}
            for b in batches
        ]
        found.append(polish_(model, dense, *set_apart(dense, changed), steps=4)["after"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_recipe_asks_for_it(tiny, inputs_for):
    batches = [inputs_for("llama", seed, (9, 6, 4, 7) * 4) for seed in range(4)]
    stage = {"stage": "prune", "units": ["weights"], "sparsity": 0.7}
    recipe = {"stages": [{**stage, "weights": {"polish_steps": 12}}]}
    entry = compress(tiny("llama"), recipe, batches).report["pruning"][0]
    assert set(entry["polish"]) == {"before", "after", "kept"}
    assert (
        "polish" not in compress(tiny("llama"), {"stages": [stage]}, batches).report["pruning"][0]
    )


def test_examples_that_judge_are_not_fitted(tiny, inputs_for, monkeypatch):
    """A decoder learns its calibration text by heart, and would judge itself by what it knows."""
    seen = {}

    def walk(model, stage, batches, seed, **more):
        seen["walk"] = batches
        return prune_stage_(model, stage, batches, seed, **more)

    def polish(model, dense, batches, judges, **more):
        seen["polish"], seen["judges"] = batches, judges
        return polish_(model, dense, batches, judges, **more)

    monkeypatch.setattr(split, "prune_stage_", walk)
    monkeypatch.setattr(split, "polish_", polish)
    given = [inputs_for("llama", seed, (9, 6, 4, 7) * 4) for seed in range(4)]
    stage = {"stage": "prune", "units": ["weights"], "sparsity": 0.5}
    polished = {**stage, "weights": {"polish_steps": 2}}
    compress(tiny("llama"), {"stages": [polished]}, given)
    rows = {
        name: {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
        for name, batches in seen.items()
    }
    assert rows["walk"] == rows["polish"]
    assert not rows["walk"] & rows["judges"]
    assert len(rows["walk"]) + len(rows["judges"]) == 64
    assert 4 < len(rows["judges"]) < 25
    few = [inputs_for("llama", 0, (9,))]
    with pytest.raises(DataError, match="one calibration example in five judges"):
        compress(tiny("llama"), {"stages": [{**polished, "min_calibration_samples": 1}]}, few)


def test_what_it_needs(case, tiny, inputs_for):
    model, dense, _, _ = case("bert")
    with pytest.raises(DataError, match="needs calibration batches"):
        polish_(model, dense, [], [], steps=1)
    base = tiny("bert").bert
    with pytest.raises(DataError, match="BertModel gives no logits"):
        polish_(base, base, [inputs_for("bert")], [], steps=1)

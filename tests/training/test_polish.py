"""Norms and biases alone are trained, and only kept where held-out examples say so."""

import pytest
import torch

from hf_prune import compress, oneshot, split
from hf_prune.errors import DataError
from hf_prune.training.polish import polish_, with_judges
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks


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
    result = polish_(model, dense, *with_judges(dense, batches), steps=24, learning_rate=5e-3)
    assert result["kept"]
    assert result["after"] < result["before"]
    assert gap() < 0.95 * before
    for key, value in model.state_dict().items():
        assert value.ndim == 1 or torch.equal(value, state[key]), key
    for key, mask in masks.items():
        assert not model.get_parameter(key)[~mask].any()
    assert all(p.grad is None for p in model.parameters())


def test_what_is_ignored_is_left_alone(case):
    model, dense, batches, _ = case("bert")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ignore = ("encoder.layer.0.*", "classifier.bias")
    found = polish_(
        model, dense, *with_judges(dense, batches), steps=24, learning_rate=5e-3, ignore=ignore
    )
    assert found["kept"]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert not any("layer.0." in name or name == "classifier.bias" for name in moved)
    assert any("layer.1." in name for name in moved)


def test_what_makes_it_worse_is_taken_back(case):
    model, dense, batches, _ = case("bert")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    result = polish_(model, dense, *with_judges(dense, batches), steps=4, learning_rate=50.0)
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
        found.append(polish_(model, dense, *with_judges(dense, changed), steps=4)["after"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


UNITS = {
    "weights": [("weights",)],
    "heads and neurons": [("heads", "neurons")],
    "one budget": [("neurons", "weights")],
    "hidden": [("hidden",)],
    "one after the other": [("neurons",), ("weights",)],
}


@pytest.mark.parametrize("units", UNITS)
def test_examples_that_judge_are_seen_by_nothing_before(units, tiny, inputs_for, monkeypatch):
    """A decoder learns its calibration text by heart, and would judge itself by what it knows.

    Whatever else is held out of the fits is held out of what is left.
    """
    seen = {"fitted": [], "judges": [], "dense": [], "held out": 0}

    def polish(model, dense, batches, judges, **more):
        seen["fitted"] += batches
        seen["judges"] += judges
        seen["dense"].append(dense)
        return polish_(model, dense, batches, judges, **more)

    def watch(room, name, place):
        real = getattr(room, name)

        def watched(*args, **kwargs):
            seen["fitted"] += args[place]
            found = real(*args, **kwargs)
            if name == "dense_targets":
                seen["held out"] += sum(int(part.sum()) for part in found.held_out)
            return found

        monkeypatch.setattr(room, name, watched)

    watch(split, "prune_stage_", 2)
    watch(oneshot, "collect", 2)
    watch(oneshot, "dense_targets", 1)
    monkeypatch.setattr(split, "polish_", polish)
    monkeypatch.setattr(oneshot, "polish_", polish)
    given = [inputs_for("llama", seed, (9, 6, 4, 7) * 4) for seed in range(4)]
    common = {"stage": "prune", "sparsity": 0.5, "sequence_length": 16}
    stages = [{**common, "units": list(names)} for names in UNITS[units]]
    polished = [*stages[:-1], {**stages[-1], "polish_steps": 2}]
    model = tiny("llama")
    report = compress(model, {"stages": polished}, given).report
    entries = [entry["polish"] for entry in report["pruning"] if "polish" in entry]
    assert [set(entry) for entry in entries] == [{"before", "after", "kept"}]
    assert seen["dense"] == [model]
    fitted, judges = (
        {tuple(row.tolist()) for batch in seen[name] for row in batch["input_ids"]}
        for name in ("fitted", "judges")
    )
    assert not fitted & judges
    assert len(fitted) + len(judges) == 64
    assert 4 < len(judges) < 25
    assert (seen["held out"] > 4) == (units != "weights")
    few = [inputs_for("llama", 0, (9,))]
    one = [{**stage, "min_calibration_samples": 1} for stage in polished]
    with pytest.raises(DataError, match="one calibration example in five judges"):
        compress(tiny("llama"), {"stages": one}, few)
    left = [{**stage, "min_calibration_samples": 60} for stage in polished]
    with pytest.raises(DataError, match="examples to fit to, fewer than min_calibration_samples"):
        compress(tiny("llama"), {"stages": left}, given)
    bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in given]
    with pytest.raises(DataError, match="LlamaModel gives no logits"):
        compress(tiny("llama").model, {"stages": polished}, bare)


def test_heads_and_neurons_come_nearer_too(tiny, inputs_for):
    given = [inputs_for("bert", seed, (9, 6, 4, 7) * 8) for seed in range(4)]
    stage = {"stage": "prune", "sparsity": 0.7, "sequence_length": 16, "polish_steps": 60}
    polish = compress(tiny("bert"), {"stages": [stage]}, given).report["pruning"][0]["polish"]
    assert polish["kept"]
    assert polish["after"] < 0.95 * polish["before"]


def test_what_it_needs(case, tiny, inputs_for):
    model, dense, _, _ = case("bert")
    with pytest.raises(DataError, match="needs calibration batches"):
        polish_(model, dense, [], [], steps=1)
    base = tiny("bert").bert
    with pytest.raises(DataError, match="BertModel gives no logits"):
        polish_(base, base, [inputs_for("bert")], [], steps=1)

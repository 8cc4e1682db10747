"""Heads, neurons and single weights that go in one training."""

import pytest
import torch
from test_resume import joint, trainer

from hf_prune import KeepZeros, PruneCallback, remove_units
from hf_prune.errors import ConfigError
from hf_prune.recipe import count_to_remove
from hf_prune.surgery.shared import survivors
from hf_prune.weights.find import find_weights


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_survivors_are_what_removal_leaves(tiny, uneven_plan, name):
    model = tiny(name)
    plan = uneven_plan(model)
    names = list(find_weights(model))
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    found = survivors(model, plan, names)
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in names)
    remove_units(model, plan)
    assert any(found[n].shape != before[n].shape for n in names)
    for n in names:
        assert torch.equal(before[n].flatten()[found[n]], model.get_parameter(n)), n


@pytest.mark.parametrize("masks", ["scored", "movement", "l0"])
def test_both_goals_are_met_at_the_end(tiny, tmp_path, masks):
    model = tiny("bert")
    callback = PruneCallback(joint(masks=masks))
    job = trainer(model, tmp_path, callback, save_strategy="no")
    job.train()
    assert callback.selection.met
    assert callback.selection.outcomes[0].removed > 0
    total = sum(mask.numel() for mask in callback.masks.values())
    zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in callback.masks)
    assert zeros == count_to_remove(0.4, total), "of what stays, and not of what is gone"
    for name, mask in callback.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name
    assert sum(callback.plan.weights.values()) == total - zeros
    assert callback.plan.sites == callback.selection.plan.sites
    logs = [e for e in job.state.log_history if "prune/sparsity_of_weights" in e]
    assert logs[0]["prune/sparsity_of_weights"] < logs[-1]["prune/sparsity_of_weights"] == 0.4
    assert logs[-1]["prune/kept_weights"] < logs[-1]["prune/parameters"]
    trainer(model, tmp_path, KeepZeros(callback.masks), save_strategy="no").train()
    assert sum(int((model.get_parameter(n) == 0).sum()) for n in callback.masks) == zeros


def test_weights_of_closed_units_are_left_alone(tiny, inputs_for):
    """They would fill the share of zeros, and could not come back with their unit."""
    callback = PruneCallback(joint())
    model = tiny("bert")
    callback.pruning.start(model)
    model(**inputs_for("bert")).loss.backward()
    callback.pruning.observe()
    names = list(callback.pruning.weights.matrices())
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    callback.pruning.decide(0.8)
    inside = survivors(model, callback.selection.plan, names)
    assert any(places.numel() < before[name].numel() for name, places in inside.items())
    zeros = 0
    for name in names:
        changed = model.get_parameter(name).detach() != before[name]
        outside = torch.ones(changed.numel(), dtype=torch.bool)
        outside[inside[name].flatten()] = False
        assert not changed.flatten()[outside].any()
        zeros += int((~callback.masks[name]).sum())
    assert zeros == count_to_remove(0.4 * 0.8, sum(p.numel() for p in inside.values()))
    callback.pruning.structure.gates.remove()


def test_what_does_not_fit_together_is_refused():
    whole = joint()
    whole["stages"][1]["schedule"] = {"every": 5}
    with pytest.raises(ConfigError, match="single weights with the same schedule"):
        PruneCallback(whole)
    whole["stages"][1:2] = []
    whole["stages"].insert(1, whole["stages"][0])
    with pytest.raises(ConfigError, match="needs a train or distill stage after it"):
        PruneCallback(whole)

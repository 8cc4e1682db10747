"""Units without effect go, and what the model computes stays."""

import pytest
import torch
from tinies import EXPERTS

from hf_prune.sites import base_model, find_sites, get_parameter, logical_weight, projection
from hf_prune.surgery.dead import find_dead, remove_dead_
from hf_prune.weights.find import find_weights

NAMES = ["bert", "gpt2", "llama", "phi3", "opt", "t5", "vit", "wav2vec2", "whisper", "mpnet"]


def kill(model, site, *, columns=(), rows=()):
    """Zero the columns of some units in the output projection, and all rows of others."""
    base = base_model(model)
    width = site.gate.width
    out = logical_weight(projection(base, site.gate.module)).data
    for unit in columns:
        out[:, unit * width : (unit + 1) * width] = 0
    for unit in rows:
        for item in (s for s in site.slices if s.axis == 0):
            weight = logical_weight(projection(base, item.module)).data
            start = item.offset + unit * item.width
            weight[start : start + item.width] = 0


@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_and_shapes_shrink(name, tiny, inputs_for, logits):
    model, batch = tiny(name), inputs_for(name)
    sites = [site for site in find_sites(model) if site.kind == "neurons"]
    for place, site in enumerate(sites):
        kill(model, site, columns=(1, 3 + place), rows=(5, 7))
    before = logits(model, batch)
    masks = {key: weight != 0 for key, weight in find_weights(model).items()}
    plan, narrowed = remove_dead_(model, masks)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)
    assert set(plan.sites) == {site.name for site in sites}
    for place, site in enumerate(sites):
        assert {1, 3 + place} <= set(plan.sites[site.name].removed) <= {1, 3 + place, 5, 7}
    found = find_weights(model)
    assert {k: m.shape for k, m in narrowed.items()} == {k: w.shape for k, w in found.items()}
    assert all(torch.equal(weight != 0, narrowed[key]) for key, weight in found.items())


def test_a_constant_moves_into_the_bias(tiny, inputs_for, logits):
    model, batch = tiny("bert"), inputs_for("bert")
    site = next(site for site in find_sites(model) if site.kind == "neurons")
    kill(model, site, rows=(2,))
    bias = projection(base_model(model), site.gate.module).bias
    old, before = bias.detach().clone(), logits(model, batch)
    plan, _ = remove_dead_(model)
    assert plan.sites[site.name].removed == (2,)
    new = projection(base_model(model), site.gate.module).bias
    assert not torch.equal(new, old)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "t5", "mpnet", "deberta-v2", "gpt_neox"])
def test_a_head_goes_when_nothing_reads_it(name, tiny, inputs_for, logits):
    model, batch = tiny(name), inputs_for(name)
    site = next(site for site in find_sites(model) if site.kind == "heads")
    kill(model, site, columns=(1,))
    before = logits(model, batch)
    plan, _ = remove_dead_(model)
    assert plan.sites[site.name].removed == (1,)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


def test_one_zero_factor_is_enough(tiny, inputs_for, logits):
    """A gated neuron is a product; a head without values is a mean of zeros."""
    model, batch = tiny("llama"), inputs_for("llama")
    layer = model.model.layers[1]
    layer.mlp.up_proj.weight.data[:2] = 0
    layer.mlp.gate_proj.weight.data[3] = 0
    attention = next(s for s in find_sites(model) if s.kind == "heads" and s.layer == 1)
    read = next(s for s in attention.slices if s.module.endswith("v_proj"))
    layer.self_attn.v_proj.weight.data[: read.width] = 0
    layer.self_attn.q_proj.weight.data[-read.width :] = 0  # a head that looks everywhere alike
    before = logits(model, batch)
    plan, _ = remove_dead_(model)
    assert plan.sites["layers.1.ffn"].removed == (0, 1, 3)
    assert plan.sites[attention.name].removed == (0,)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


def test_zero_values_with_a_bias_are_no_zeros(tiny, inputs_for, logits):
    model, batch = tiny("bert"), inputs_for("bert")
    values = model.bert.encoder.layer[0].attention.self.value
    width = values.weight.shape[0] // model.config.num_attention_heads
    values.weight.data[: 2 * width] = 0
    values.bias.data[:width] = 0
    values.bias.data[width : 2 * width] = 0.3
    before = logits(model, batch)
    plan, _ = remove_dead_(model)
    assert plan.sites["encoder.layer.0.attention"].removed == (0,)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


def test_nothing_dead_nothing_removed(tiny):
    model = tiny("llama")
    plan, folded = find_dead(model)
    assert (plan.sites, folded) == ({}, {})


def test_of_a_whole_block_without_effect_one_unit_stays(tiny, inputs_for, logits):
    model, batch = tiny("llama"), inputs_for("llama")
    site = find_sites(model)[1]
    kill(model, site, columns=range(site.units))
    before = logits(model, batch)
    plan, _ = remove_dead_(model)
    assert len(plan.sites[site.name].kept) == 1
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


def kill_in_expert(model, site, expert, unit, part):
    """Zero what a neuron owns of one parameter of one expert: its column, or one of its rows."""
    item = site.slices[part]
    parameter = get_parameter(base_model(model), item).data[expert]
    parameter.select(item.axis - 1, item.offset + unit).zero_()


@pytest.mark.parametrize("name", EXPERTS)
def test_neurons_of_experts_go_where_they_add_nothing_in_any(name, tiny, inputs_for, logits):
    """Dead by another part in each expert; one too many for the multiple; one alive in the last."""
    model, batch = tiny(name), inputs_for(name)
    site = find_sites(model, ["expert_neurons"])[0]
    for unit in range(3, 3 + site.multiple + 1):
        for expert in range(4):
            kill_in_expert(model, site, expert, unit, (unit + expert) % len(site.slices))
    for expert in range(3):
        kill_in_expert(model, site, expert, 2, -1)
    before = logits(model, batch)
    masks = {key: weight != 0 for key, weight in find_weights(model).items()}
    plan, narrowed = remove_dead_(model, masks)
    assert plan.sites[site.name].removed == tuple(range(3, 3 + site.multiple))
    assert list(plan.sites) == [site.name]
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)
    found = find_weights(model)
    assert all(torch.equal(weight != 0, narrowed[key]) for key, weight in found.items())


def test_a_zero_that_the_activation_changes_is_no_zero(tiny):
    model = tiny("mixtral")
    site = find_sites(model, ["expert_neurons"])[0]
    get_parameter(base_model(model), site.slices[0]).data.zero_()
    assert list(find_dead(model)[0].sites) == [site.name]
    base_model(model).get_submodule(site.gate.module).act_fn = torch.nn.Sigmoid()
    assert not find_dead(model)[0].sites

"""Removal, weight by weight."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from hf_prune.errors import PlanError, UnsupportedModelError
from hf_prune.families import FAMILIES
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites
from hf_prune.surgery.remove import remove_units

families = pytest.mark.parametrize("name", sorted(FAMILIES))


def heads(site, kept):
    return SitePlan(site.kind, site.units, tuple(kept))


def test_bert_by_hand(tiny):
    """Heads 0 and 3 of 4 stay: rows 0..8 and 24..32 of the projections, columns of the output."""
    model, dense = tiny("bert"), tiny("bert")
    site, ffn = find_sites(model)[2:]
    plan = Plan("bert", {site.name: heads(site, (0, 3)), ffn.name: heads(ffn, range(5, 9))})
    remove_units(model, plan)
    ours, theirs = model.bert.encoder.layer[1], dense.bert.encoder.layer[1]
    index = [*range(8), *range(24, 32)]
    for name in ("query", "key", "value"):
        new, old = getattr(ours.attention.self, name), getattr(theirs.attention.self, name)
        assert torch.equal(new.weight, old.weight[index])
        assert torch.equal(new.bias, old.bias[index])
        assert (new.out_features, new.in_features) == (16, 32)
    new, old = ours.attention.output.dense, theirs.attention.output.dense
    assert torch.equal(new.weight, old.weight[:, index])
    assert torch.equal(new.bias, old.bias)
    assert torch.equal(ours.intermediate.dense.weight, theirs.intermediate.dense.weight[5:9])
    assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight[:, 5:9])
    core = ours.attention.self
    assert (core.num_attention_heads, core.all_head_size, core.attention_head_size) == (2, 16, 8)
    assert model.bert.encoder.layer[0].attention.self.all_head_size == 32


def test_gpt2_by_hand(tiny):
    """Three packed projections, stored as [in, out]."""
    model, dense = tiny("gpt2"), tiny("gpt2")
    site = find_sites(model)[0]
    remove_units(model, Plan("gpt2", {site.name: heads(site, (1,))}))
    new, old = model.transformer.h[0].attn, dense.transformer.h[0].attn
    index = [start + i for start in (0, 32, 64) for i in range(8, 16)]
    assert torch.equal(new.c_attn.weight, old.c_attn.weight[:, index])
    assert torch.equal(new.c_attn.bias, old.c_attn.bias[index])
    assert torch.equal(new.c_proj.weight, old.c_proj.weight[8:16])
    assert torch.equal(new.c_proj.bias, old.c_proj.bias)
    assert (new.num_heads, new.split_size) == (1, 8)


def test_llama_by_hand(tiny):
    """A key/value head goes with its two query heads."""
    model, dense = tiny("llama"), tiny("llama")
    site = find_sites(model)[0]
    remove_units(model, Plan("llama", {site.name: heads(site, (1,))}))
    new, old = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    assert torch.equal(new.q_proj.weight, old.q_proj.weight[16:])
    assert torch.equal(new.k_proj.weight, old.k_proj.weight[8:])
    assert torch.equal(new.v_proj.weight, old.v_proj.weight[8:])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, 16:])


@families
def test_nothing_changes_when_a_part_is_wrong(name, tiny, uneven_plan):
    model = tiny(name)
    plan = uneven_plan(model)
    before = [id(p) for p in model.parameters()]
    sites = {**plan.sites, "nowhere": SitePlan("heads", 2, (0,))}
    with pytest.raises(PlanError, match="no site 'nowhere'"):
        remove_units(model, Plan(name, sites))
    assert [id(p) for p in model.parameters()] == before
    assert getattr(model.config, "quantization_config", None) is None


@families
def test_two_steps_are_one(name, tiny, uneven_plan):
    """`Plan.then`: what two removals leave, in the numbering of the model before both."""
    twice, once = tiny(name), tiny(name)
    first = uneven_plan(twice, seed=3)
    remove_units(twice, first)
    second = uneven_plan(twice, seed=4)
    remove_units(twice, second)
    remove_units(once, first.then(second))
    for (key, ours), theirs in zip(twice.named_parameters(), once.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert twice.config.quantization_config == once.config.quantization_config


@families
def test_frozen_and_dtype_stay(name, tiny, uneven_plan):
    model = tiny(name).to(torch.bfloat16)
    for parameter in base_model(model).parameters():
        parameter.requires_grad_(False)
    remove_units(model, uneven_plan(model))
    assert not any(p.requires_grad for p in base_model(model).parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@families
def test_new_parameters_hold_no_old_memory(name, tiny, uneven_plan):
    model = tiny(name)
    remove_units(model, uneven_plan(model))
    for key, parameter in model.named_parameters():
        assert parameter.is_contiguous(), key
        size = parameter.numel() * parameter.element_size()
        assert parameter.untyped_storage().nbytes() == size, key


def test_copies_are_independent(tiny, uneven_plan):
    model = tiny("bert")
    other = copy.deepcopy(model)
    remove_units(model, uneven_plan(model))
    assert getattr(other.config, "quantization_config", None) is None
    assert other.bert.encoder.layer[0].attention.self.query.weight.shape == (32, 32)


def test_wrapper(tiny):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.config = module, module.config

    with pytest.raises(UnsupportedModelError, match="Wrapper is not a transformers PreTrainedMod"):
        remove_units(Wrapper(tiny("bert")), Plan("bert"))


def test_copies_share_a_description_that_nobody_changes(tiny, uneven_plan):
    """transformers copies configs in forward passes: whole copies would slow small models down."""
    model = tiny("bert")
    remove_units(model, uneven_plan(model))
    shapes = model.config.quantization_config
    other = copy.deepcopy(model)
    assert other.config.quantization_config is shapes
    before = json.dumps(shapes)
    remove_units(other, uneven_plan(other))
    assert other.config.quantization_config != shapes
    assert json.dumps(model.config.quantization_config) == before
    plain = pickle.loads(pickle.dumps(shapes))  # noqa: S301  # our own
    assert type(plain) is dict
    assert plain == shapes

"""Sites: what each unit owns, and what is refused."""

import copy

import pytest
import torch
from tinies import CORE, SEQ2SEQ
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    FNetConfig,
    FNetModel,
    GPT2Config,
    T5Config,
    T5EncoderModel,
)
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.families import FAMILIES, get_family
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import (
    ALL_KINDS,
    KINDS,
    Slice,
    base_model,
    find_sites,
    gate_weight,
    layer_modules,
    logical_weight,
    projection,
)
from hf_prune.surgery.remade import get_attribute
from hf_prune.surgery.remove import remove_units

families = pytest.mark.parametrize("name", sorted(FAMILIES))


@pytest.mark.parametrize("name", CORE)
def test_every_layer_has_two_sites(name, tiny):
    model = tiny(name)
    layers = model.config.num_hidden_layers
    sites = find_sites(model)
    assert [site.kind for site in sites] == ["heads", "neurons"] * layers
    assert [site.layer for site in sites] == [i for i in range(layers) for _ in range(2)]
    assert len({site.name for site in sites}) == 2 * layers
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    assert {site.units for site in sites if site.kind == "heads"} == {heads}
    assert {site.units for site in sites if site.kind == "neurons"} == {48}
    assert len(layer_modules(model)) == layers


@families
def test_every_layer_has_attention_and_a_feed_forward_block(name, tiny):
    sites = find_sites(tiny(name), ALL_KINDS)
    layers = {site.layer_module: [] for site in sites}
    for site in sites:
        layers[site.layer_module].append(site.kind)
    assert len(layers) == len(layer_modules(tiny(name))) >= 2
    experts = ["heads", "expert_neurons", "experts"]
    for layer, kinds in layers.items():
        cross = ["heads"] if name in SEQ2SEQ and layer.startswith("decoder") else []
        assert kinds in (["heads", *cross, "neurons"], experts), layer
        assert (kinds == experts) == (
            name == "mixtral" or (name, layer) == ("qwen3_moe", "layers.0")
        )


def size(base, item):
    """How long the axis of a slice is."""
    if item.parameter:
        return base.get_submodule(item.module).get_parameter(item.parameter).shape[item.axis]
    return logical_weight(projection(base, item.module)).shape[item.axis]


@families
def test_slices_do_not_overlap_and_cover_the_projections(name, tiny):
    """Each row or column of a projection belongs to exactly one unit."""
    model = tiny(name)
    base = base_model(model)
    for site in find_sites(model, ALL_KINDS):
        rows = {}
        for item in site.slices:
            owned = rows.setdefault((item.module, item.parameter, item.axis), [])
            owned += range(item.offset, item.offset + site.units * item.width)
        for (module, parameter, axis), owned in rows.items():
            assert sorted(owned) == list(range(size(base, Slice(module, axis, 1, 0, parameter))))


@families
def test_costs_of_all_units_are_all_there_is(name, tiny):
    """All that the projections hold, but for the biases of the outputs."""
    model = tiny(name)
    base = base_model(model)
    for site in find_sites(model):
        modules = {item.module for item in site.slices}
        total = sum(p.numel() for m in modules for p in projection(base, m).parameters())
        bias = projection(base, site.gate.module).bias
        assert site.units * site.parameters == total - (0 if bias is None else bias.numel())


@families
def test_attributes_are_true(name, tiny):
    model = tiny(name)
    for site in find_sites(model, ALL_KINDS):
        for item in site.attributes:
            holder = base_model(model).get_submodule(item.module)
            assert get_attribute(holder, item.name) == site.units * item.per_unit, item


@families
def test_gate_weight_by_hand(name, tiny):
    model = tiny(name)
    base = base_model(model)
    for site in find_sites(model):
        weight = logical_weight(projection(base, site.gate.module))
        found = gate_weight(base, site)
        for unit in range(site.units):
            start = unit * site.gate.width
            columns = weight[:, start : start + site.gate.width]
            assert torch.equal(found[unit], columns.flatten()), unit


def test_gate_weight_of_experts_by_hand(tiny):
    model = tiny("mixtral")
    neurons, experts = find_sites(model, ["expert_neurons", "experts"])[:2]
    down = model.model.layers[0].mlp.experts.down_proj  # [X, E, F]
    assert torch.equal(gate_weight(model.model, experts)[2], down[2].flatten())
    assert torch.equal(gate_weight(model.model, neurons)[5], down[:, :, 5].flatten())


def test_logical_weight_undoes_conv1d():
    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)
    assert logical_weight(linear).shape == logical_weight(conv).shape == (5, 3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(conv(x), x @ logical_weight(conv).T + conv.bias)
    assert torch.equal(logical_weight(conv, gradient=True), torch.zeros(5, 3))
    conv(x).sum().backward()
    assert torch.equal(logical_weight(conv, gradient=True), conv.weight.grad.T)


def test_kinds_and_ignored_names(tiny):
    model = tiny("bert")
    assert {s.kind for s in find_sites(model, ["heads"])} == {"heads"}
    names = [s.name for s in find_sites(model, ignore=["encoder.layer.0.*", "*.ffn"])]
    assert names == ["encoder.layer.1.attention"]


@pytest.mark.parametrize(
    ("kinds", "pattern", "message"),
    [
        (KINDS, "encoder.layer.9.*", r"nothing is called 'encoder\.layer\.9\.\*'; did you mean 'e"),
        (
            KINDS,
            "clasifier",
            r"'clasifier'; did you mean 'classifier'\? Known: encoder\.layer\.0\.",
        ),
        (KINDS, "bert.encoder.layer.0.*", "fits something that holds what is pruned, but nothing"),
        (KINDS, "encoder.layer.0", "fits something that holds"),
        (["heads"], "encoder.layer.1.attention.self.query", "fits something that holds"),
        (["heads"], "encoder.layer.1.attention.self.query.bias", "fits something that holds"),
        (["neurons"], "BertLayer", "fits something that holds"),
        (["hidden"], "*LayerNorm", "fits something that holds"),
    ],
)
def test_what_is_to_be_ignored_must_be_there(kinds, pattern, message, tiny):
    with pytest.raises(ConfigError, match=message):
        find_sites(tiny("bert"), kinds, ["encoder.layer.0.ffn", pattern])


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        (KINDS, "classifier*"),
        (KINDS, "bert.pooler.dense"),
        (KINDS, "*embeddings*"),
        (KINDS, "lm_head.*"),  # of another task
        (KINDS, "encoder.layer.0.attention.output.LayerNorm.weight"),
        (["heads"], "encoder.layer.1.ffn"),  # a site, but of another kind
        (["neurons"], "*.self.query"),
        (["heads"], "hidden"),
    ],
)
def test_what_cannot_go_may_be_ignored(kinds, pattern, tiny):
    names = [site.name for site in find_sites(tiny("bert"), kinds)]
    assert [site.name for site in find_sites(tiny("bert"), kinds, [pattern])] == names


def test_a_block_that_is_gone_may_be_ignored(tiny):
    model = tiny("bert")
    gone = {s.name: SitePlan(s.kind, s.units, ()) for s in find_sites(model) if s.layer == 0}
    remove_units(model, Plan("bert", gone))
    left = [site.name for site in find_sites(model)]
    assert [site.name for site in find_sites(model, ignore=sorted(gone))] == left
    assert left == [site.name for site in find_sites(tiny("bert")) if site.layer]


def test_unknown_family():
    with pytest.raises(UnsupportedModelError, match=r"'t6' has no description\. Known: albert, "):
        get_family("t6")
    config = FNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(UnsupportedModelError, match="model_type 'fnet' has no description"):
        find_sites(FNetModel(config))


def test_an_encoder_alone(tiny):
    """Of a family with two stacks, a model may have one."""
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    names = [site.name for site in find_sites(T5EncoderModel(config))]
    assert names == ["encoder.block.0.layer.0.SelfAttention", "encoder.block.0.ffn"]


def test_no_stack_at_all(tiny):
    model = tiny("bart")
    del model.model.encoder, model.model.decoder
    with pytest.raises(
        UnsupportedModelError, match=r"no layers at encoder\.layers or decoder\.lay"
    ):
        find_sites(model)


class Wrapper(nn.Module):
    """As DistributedDataParallel does, it holds a model and has its config."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.config = module.config


def test_wrapper(tiny):
    with pytest.raises(UnsupportedModelError, match=r"Wrapper is not a .*Unwrap it first: `\.mod"):
        find_sites(Wrapper(tiny("bert")))


def test_quantized(tiny):
    model = tiny("bert")
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match=r"the model is quantized\. Prune first"):
        find_sites(model)


class LoraLinear(nn.Linear):
    """As an adapter, it is a Linear and not only that."""


def test_adapter(tiny):
    model = tiny("bert")
    model.bert.encoder.layer[1].output.dense = LoraLinear(48, 32)
    with pytest.raises(UnsupportedModelError, match=r"layer\.1\.output\.dense is a LoraLinear"):
        find_sites(model)


def test_another_layout(tiny):
    model = tiny("bert")
    del model.bert.encoder.layer[1].intermediate.dense
    with pytest.raises(UnsupportedModelError, match=r"no module 'encoder\.layer\.1\.intermediate"):
        find_sites(model)


@pytest.mark.parametrize("cls", [BertConfig, GPT2Config])
def test_cross_attention(cls):
    """A layer has cross-attention where its config asks for it, and it counts its own heads."""
    config = cls(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
        add_cross_attention=True,
    )
    sites = find_sites(AutoModel.from_config(config))
    assert [site.kind for site in sites] == ["heads", "heads", "neurons"]
    assert sites[1].name.endswith("crossattention")
    assert sites[1].units == 2


@pytest.mark.parametrize(
    ("name", "change", "site", "found"),
    [
        ("opt", {"do_layer_norm_before": False}, 0, "self_attn_layer_norm"),
        ("opt", {}, 0, "final_layer_norm"),
        ("gpt_neox", {"use_parallel_residual": False}, 0, "post_attention_layernorm"),
        ("gpt_neox", {}, 0, ""),
        ("wav2vec2", {"do_stable_layer_norm": True}, 1, ""),
        ("wav2vec2", {}, 1, "final_layer_norm"),
    ],
)
def test_variants(name, change, site, found, tiny):
    """Where the sum of residual and output is depends on the config."""
    config = copy.deepcopy(tiny(name).config)
    for key, value in change.items():
        setattr(config, key, value)
    item = find_sites(AutoModel.from_config(config))[site]
    assert item.sum_module.removeprefix(item.layer_module).strip(".") == found

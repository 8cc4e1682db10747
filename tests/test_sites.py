"""Sites: what each unit owns, and what is refused."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import UnsupportedModelError
from hf_prune.families import FAMILIES, get_family
from hf_prune.sites import (
    base_model,
    find_sites,
    gate_weight,
    layer_modules,
    logical_weight,
    projection,
)

families = pytest.mark.parametrize("name", sorted(FAMILIES))


@families
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
def test_slices_do_not_overlap_and_cover_the_projections(name, tiny):
    """Each row or column of a projection belongs to exactly one unit."""
    model = tiny(name)
    base = base_model(model)
    for site in find_sites(model):
        rows = {}
        for item in site.slices:
            owned = rows.setdefault((item.module, item.axis), [])
            owned += range(item.offset, item.offset + site.units * item.width)
        for (module, axis), owned in rows.items():
            size = logical_weight(projection(base, module)).shape[axis]
            assert sorted(owned) == list(range(size)), (module, axis)


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
    for site in find_sites(model):
        for item in site.attributes:
            holder = base_model(model).get_submodule(item.module)
            assert getattr(holder, item.name) == site.units * item.per_unit, item


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


def test_unknown_family():
    with pytest.raises(UnsupportedModelError, match=r"'t6' has no description\. Known: bert, dist"):
        get_family("t6")
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="model_type 't5' has no description"):
        find_sites(T5EncoderModel(config))


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


def test_cross_attention():
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        is_decoder=True,
        add_cross_attention=True,
    )
    with pytest.raises(UnsupportedModelError, match="add_cross_attention is on"):
        find_sites(BertModel(config))

"""Layers without units leave their list, where the model stays what it was."""

import copy
import json

import pytest
import torch
from tinies import DECODERS, EAGER_ONLY, auto_class
from transformers import AutoModelForCausalLM

from hf_prune.families import FAMILIES
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_layers, find_sites
from hf_prune.surgery.layers import moved_parameters, shorten_layers_
from hf_prune.surgery.remove import remove_units

AFTER = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
STAYS = {*AFTER, "albert", "deberta-v2", "bart", "wav2vec2", "mixtral"}
"""Families whose layers do more than add: a norm comes after the sum, or experts must stay."""
SHORTER = sorted(set(FAMILIES) - STAYS)


def without_layers(model, gone, *, rest=True):
    """All units of some layers of each list go, and (`rest`) every second one elsewhere."""
    sites = {}
    for site in find_sites(model):
        here = site.layer_module.rpartition(".")[2] in {str(index) for index in gone}
        kept = () if here else tuple(range(0, site.units, 2 if rest else 1))
        sites[site.name] = SitePlan(site.kind, site.units, kept)
    return Plan(model.config.model_type, sites)


def reload(name, model, folder):
    model.save_pretrained(folder)
    options = {"attn_implementation": "eager"} if name in EAGER_ONLY else {}
    loaded, info = auto_class(name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval(), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_model_stays_what_it_was(name, rest, tiny, inputs_for, logits, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    remove_units(model, without_layers(model, [1], rest=rest))
    expected, layers = logits(model, batch), find_layers(model)
    before = copy.deepcopy(model.config.to_dict())
    names = shorten_layers_(model)
    if name in STAYS:
        assert names == {}
        assert torch.equal(logits(model, batch), expected)
        assert model.config.to_dict() == before
        return
    stay = [layer for layer in layers if not layer.name.endswith(".1")]
    assert list(names.values()) == [layer.name for layer in stay]
    assert list(names) == [layer.name for layer in find_layers(model)]
    assert len(names) < len(layers)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    loaded, config = reload(name, model, tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert ("quantization_config" in config) is rest, "a plain config says a number of layers"
    assert rest or "per_layer_config" not in config.get("text_config", config)


@pytest.fixture
def deep(tiny):
    """`deep(name)`: the tiny decoder with five layers."""

    def make(name, **options):
        config = copy.deepcopy(tiny(name).config)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
                if vars(part).get(key):
                    setattr(part, key, [vars(part)[key][i % 2] for i in range(5)])
            part.num_hidden_layers = 5
        config.update(options)
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data.add_(noise, alpha=0.1 if parameter.ndim > 1 else 0.2)
        return model

    return make


MODES = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("name", [n for n in DECODERS if n in SHORTER and n != "qwen3_moe"])
def test_layers_that_move_up(name, mode, deep, inputs_for, tmp_path):
    """Kinds of layer, their numbers and their caches move with them."""
    model = deep(name)
    prompt = {k: v.flip(1) for k, v in inputs_for(name).items() if k != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, **MODES[mode]}
    remove_units(model, without_layers(model, [1, 2]))
    expected = model.generate(**prompt, **options)
    names = shorten_layers_(model)
    path = find_layers(model)[0].list
    assert names == {f"{path}.0": f"{path}.0", f"{path}.1": f"{path}.3", f"{path}.2": f"{path}.4"}
    loaded, _ = reload(name, model, tmp_path)
    for each in (model, loaded):
        found = each.generate(**prompt, **options)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_experts_are_renumbered(deep, inputs_for, logits, tmp_path):
    model, batch = deep("qwen3_moe", mlp_only_layers=[1, 2, 4]), inputs_for("qwen3_moe")
    remove_units(model, without_layers(model, [1, 2]))
    expected = logits(model, batch)
    assert len(shorten_layers_(model)) == 3
    assert model.config.mlp_only_layers == [2]
    loaded, _ = reload("qwen3_moe", model, tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-5, rtol=1e-5)


def test_the_first_layer(tiny, inputs_for, logits):
    """Nothing is before it that could take its biases; without any it can go."""
    for name, goes in (("llama", True), ("gpt2", False), ("t5", False)):
        model, batch = tiny(name), inputs_for(name)
        remove_units(model, without_layers(model, [0]))
        expected, before = logits(model, batch), copy.deepcopy(model.state_dict())
        assert bool(shorten_layers_(model)) is goes, name
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
        assert goes or all(torch.equal(before[key], v) for key, v in model.state_dict().items())


def test_a_layer_whose_number_counts_stays(deep, inputs_for, logits):
    """GPT-2 may divide by the number of the layer: then the next ones would change."""
    model, batch = deep("gpt2", scale_attn_by_inverse_layer_idx=True), inputs_for("gpt2")
    remove_units(model, without_layers(model, [2]))
    expected, before = logits(model, batch), copy.deepcopy(model.config.to_dict())
    assert shorten_layers_(model) == {}
    assert torch.equal(logits(model, batch), expected)
    assert model.config.to_dict() == before
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == list(range(5))


def test_one_layer_stays(tiny):
    model = tiny("llama")
    remove_units(model, without_layers(model, [0, 1]))
    assert shorten_layers_(model) == {"layers.0": "layers.0"}
    assert model.config.num_hidden_layers == 1


def test_masks_move_with_their_layers(deep):
    model = deep("llama")
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    remove_units(model, without_layers(model, [1], rest=False))
    layers = shorten_layers_(model)
    moved = moved_parameters(model, masks, layers)
    assert {n: m.shape for n, m in moved.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert moved["model.layers.1.mlp.up_proj.weight"] is masks["model.layers.2.mlp.up_proj.weight"]

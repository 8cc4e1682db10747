"""A plain config says all widths, or the model is left alone."""

import json

import pytest
import torch
from tinies import DECODERS, EAGER_ONLY, EXPERTS, TINY, auto_class
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_prune import compress, compress_family
from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import load_recipe
from hf_prune.report.card import render_card
from hf_prune.sites import ALL_KINDS, HIDDEN, find_sites
from hf_prune.surgery.plain import make_plain_
from hf_prune.surgery.remove import remove_units

SAYABLE = [n for n in DECODERS if n not in ("gpt2", "gpt_neox", "opt")] + ["vit"]
"""Families whose config can say a number of heads."""


def even_plan(model, kinds):
    """Half of everything goes, other units in every second layer."""
    sites = {}
    for site in find_sites(model, kinds):
        kept = 8 if site.multiple > 1 and site.units > 8 else max(site.units // 2, site.floor)
        first = site.layer % 2
        sites[site.name] = SitePlan(site.kind, site.units, tuple(range(first, first + kept)))
    return Plan(model.config.model_type, sites)


@pytest.fixture
def no_hook(monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_prune")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "hf_prune")


CASES = [(n, ("neurons",)) for n in sorted(TINY)] + [(n, ALL_KINDS) for n in SAYABLE]


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_loads_with_no_plugin(name, kinds, tiny, inputs_for, logits, no_hook, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    plan = even_plan(model, kinds)
    if name == "mixtral" and kinds == ("neurons",):
        assert not plan.sites, "all its neurons are those of experts"
    remove_units(model, plan)
    expected = logits(model, batch)
    make_plain_(model)
    assert torch.equal(logits(model, batch), expected)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "per_layer_config", "auto_map"} & set(config)
    options = {"attn_implementation": "eager"} if name in EAGER_ONLY else {}
    loaded, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-5, rtol=0)
    left = {site.name: site.units for site in find_sites(loaded, ALL_KINDS)}
    assert all(left[site] == len(item.kept) for site, item in plan.sites.items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "clip", "t5"])
def test_heads_that_the_config_cannot_say(name, tiny, inputs_for, logits):
    model, batch = tiny(name), inputs_for(name)
    remove_units(model, even_plan(model, ("heads",)))
    expected, config = logits(model, batch), model.config
    spec = json.dumps(config.quantization_config)
    with pytest.raises(UnsupportedModelError, match=r"cannot say what is left of .*units: \[neuro"):
        make_plain_(model)
    assert model.config is config
    assert json.dumps(config.quantization_config) == spec
    assert torch.equal(logits(model, batch), expected)


def test_layers_that_differ(tiny, uneven_plan):
    model = tiny("bert")
    remove_units(model, uneven_plan(model))
    with pytest.raises(UnsupportedModelError, match="layers differ: intermediate_size would have"):
        make_plain_(model)


def test_a_block_without_heads(tiny):
    model = tiny("llama")
    sites = [site for site in find_sites(model) if site.kind == "heads"]
    remove_units(model, Plan("llama", {s.name: SitePlan("heads", s.units, ()) for s in sites}))
    with pytest.raises(UnsupportedModelError, match="cannot say what"):
        make_plain_(model)


STAGE = {"stage": "prune", "units": ["neurons"], "sparsity": 0.4, "even": True}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_portable_recipe(name, tiny, inputs_for, logits, no_hook, tmp_path):
    stage = {**STAGE, "min_calibration_samples": 4, "calibration_samples": 32}
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 2) for seed in range(4)]
    result = compress(tiny(name), {"portable": True, "stages": [stage]}, batches)
    counts = {len(site.kept) for site in result.plan.sites.values()}
    assert len(counts) == 1
    assert counts.pop() <= 0.6 * 48
    result.model.save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path)
    batch = inputs_for(name)
    assert torch.equal(logits(loaded, batch), logits(result.model, batch))
    card = render_card(result.report)
    assert "pip install transformers" in card
    assert "import hf_prune" not in card


def test_a_portable_family_of_models(tiny, inputs_for, no_hook, tmp_path):
    stage = {**STAGE, "min_calibration_samples": 4, "calibration_samples": 8}
    recipe = {"portable": True, "standalone": True, "stages": [stage]}
    found = compress_family(tiny("bert"), recipe, [inputs_for("bert")] * 2, targets=[0.3, 0.6])
    for index, result in enumerate(found):
        assert (result.recipe.portable, result.recipe.standalone) == (True, True)
        assert result.report["recipe"]["portable"]
        result.model.save_pretrained(tmp_path / str(index))
        loaded = auto_class("bert").from_pretrained(tmp_path / str(index))
        for name, value in result.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_portable_recipe_needs_even_layers():
    with pytest.raises(ConfigError, match="portable: true needs even: true"):
        load_recipe({"portable": True, "stages": [{**STAGE, "even": False}]})


def test_experts_are_among_the_cases():
    assert set(EXPERTS) <= set(SAYABLE)


@pytest.mark.parametrize("name", [*(n for n in SAYABLE if n != "gemma3"), "opt"])
def test_the_hidden_width_in_a_plain_config(name, tiny, inputs_for, logits, no_hook, tmp_path):
    """Gemma scales its embeddings by the root of the width that the config says."""
    model, batch = tiny(name), inputs_for(name)
    (site,) = find_sites(model, [HIDDEN])
    sites = {HIDDEN: SitePlan(HIDDEN, site.units, tuple(range(8, site.units)))}
    remove_units(model, Plan(model.config.model_type, sites))
    expected = logits(model, batch)
    if name == "opt" or name.startswith("gemma"):  # OPT makes the width of heads from it
        with pytest.raises(UnsupportedModelError, match="a plain config"):
            make_plain_(model)
        return
    make_plain_(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["hidden_size"] == 24
    options = {"attn_implementation": "eager"} if name in EAGER_ONLY else {}
    loaded = auto_class(name).from_pretrained(tmp_path, **options)
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-5, rtol=1e-5)

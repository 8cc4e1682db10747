"""What holds for every family, with plans as uneven as it allows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_prune.budget.costs import unit_cost
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import PlanError
from hf_prune.families import FAMILIES
from hf_prune.gates import close_gates, masked
from hf_prune.measure.counts import count_encoder_parameters, count_macs, count_parameters
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites
from hf_prune.surgery.remove import remove_units

NAMES = sorted(FAMILIES)
DECODERS = ("gpt2", "llama")
families = pytest.mark.parametrize("name", NAMES)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def auto(name):
    return AutoModelForCausalLM if name in DECODERS else AutoModelForSequenceClassification


def assert_same_parameters(loaded, model):
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        assert tensor.device.type == "cpu", name
    for (name, ours), theirs in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def assert_ordinary(model):
    """No trace of the hook by which it was loaded."""
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "quantization_method")
    assert not hasattr(model.config, "_is_quantized")


def assert_complete(info):
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    assert not info.get("error_msgs")


@pytest.fixture
def pruned(tiny, uneven_plan):
    def make(name, attention="sdpa", seed=0):
        model = tiny(name, attention)
        remove_units(model, uneven_plan(model, seed))
        return model

    return make


def test_every_family_has_a_tiny_model(tiny, tiny_families):
    assert tiny_families == set(FAMILIES)
    for name in NAMES:
        assert tiny(name).config.model_type == name


@families
@attentions
@seeds
def test_masked_equals_removed(name, attention, seed, tiny, inputs_for, uneven_plan, logits):
    model, batch = tiny(name, attention), inputs_for(name)
    dense = logits(model, batch)
    plan = uneven_plan(model, seed)
    with masked(model, plan):
        zeroed = logits(model, batch)
    assert torch.equal(logits(model, batch), dense), "opened gates leave no trace"
    remove_units(model, plan)
    removed = logits(model, batch)
    torch.testing.assert_close(removed, zeroed, atol=1e-5, rtol=0)
    assert (removed - dense).abs().max() > 1e-2


@families
def test_removed_units_are_the_right_rows_and_columns(name, tiny, uneven_plan):
    """Every width that is left, without the help of the forward pass."""
    model = tiny(name)
    plan = uneven_plan(model)
    remove_units(model, plan)
    for site in find_sites(model):
        assert site.units == len(plan.sites[site.name].kept)


@families
@attentions
def test_saved_equals_loaded(name, attention, pruned, inputs_for, logits, tmp_path):
    model, batch = pruned(name, attention), inputs_for(name)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    for cls in (type(model), auto(name)):
        loaded, info = cls.from_pretrained(
            tmp_path, output_loading_info=True, attn_implementation=attention
        )
        assert_complete(info)
        assert type(loaded) is type(model)
        assert_same_parameters(loaded, model)
        assert_ordinary(loaded)
        assert not loaded.training
        assert torch.equal(logits(loaded, batch), expected)


@families
def test_second_generation(name, pruned, inputs_for, logits, tmp_path):
    model, batch = pruned(name), inputs_for(name)
    model.save_pretrained(tmp_path / "one")
    once = auto(name).from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    twice, info = auto(name).from_pretrained(tmp_path / "two", output_loading_info=True)
    assert_complete(info)
    assert_same_parameters(twice, model)
    assert_ordinary(twice)
    assert torch.equal(logits(twice, batch), logits(model, batch))
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two")]
    assert configs[0] == configs[1]


@families
def test_sharded(name, pruned, tmp_path):
    model = pruned(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert_same_parameters(loaded, model)


@families
def test_loaded_in_bfloat16(name, pruned, inputs_for, logits, tmp_path):
    model, batch = pruned(name), inputs_for(name)
    model.save_pretrained(tmp_path)
    loaded, info = auto(name).from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert_complete(info)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # not buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    for (key, ours), theirs in zip(rounded.named_parameters(), loaded.parameters(), strict=True):
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(ours, theirs), key
    assert torch.equal(logits(loaded, batch), logits(rounded, batch))
    assert next(loaded.half().parameters()).dtype == torch.float16


@families
def test_base_model_from_task_checkpoint(name, pruned, inputs_for, tmp_path):
    model, batch = pruned(name), inputs_for(name)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    # RobertaModel has a pooler of its own when it stands alone
    assert all(key.startswith("pooler.") for key in info["missing_keys"])
    assert not info["mismatched_keys"]
    base = base_model(model)
    wanted = dict(base.named_parameters())
    for key, parameter in loaded.named_parameters():
        if key not in info["missing_keys"]:
            assert torch.equal(parameter, wanted[key]), key
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        ours, theirs = base(**inputs)[0], loaded(**inputs)[0]
    assert torch.equal(ours, theirs)


@families
def test_task_model_from_base_checkpoint(name, pruned, tmp_path):
    model = pruned(name)
    base_model(model).save_pretrained(tmp_path)
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours = dict(base_model(model).named_parameters())
    theirs = dict(base_model(loaded).named_parameters())
    assert list(ours) == list(theirs)
    for key, parameter in ours.items():
        assert torch.equal(theirs[key], parameter), key
    assert all(not p.is_meta for p in loaded.parameters())


def test_ties_survive(pruned, tmp_path):
    model = pruned("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert count_parameters(loaded) == count_parameters(model)


@families
def test_costs_are_exact(name, tiny, uneven_plan):
    model = tiny(name)
    sites, plan = find_sites(model), uneven_plan(model)
    dense = count_parameters(model), count_encoder_parameters(model), count_macs(model, 12)
    remove_units(model, plan)
    gone = {site.name: len(plan.sites[site.name].removed) for site in sites}
    parameters = sum(gone[site.name] * unit_cost(site, "parameters", 12) for site in sites)
    macs = sum(gone[site.name] * unit_cost(site, "macs", 12) for site in sites)
    assert dense[0] - count_parameters(model) == parameters > 0
    assert dense[1] - count_encoder_parameters(model) == parameters
    assert dense[2] - count_macs(model, 12) == macs > 0


@families
def test_a_plan_that_keeps_everything_changes_nothing(name, tiny, inputs_for, logits):
    model, batch = tiny(name), inputs_for(name)
    expected, ids = logits(model, batch), [id(p) for p in model.parameters()]
    sites = {s.name: SitePlan(s.kind, s.units, tuple(range(s.units))) for s in find_sites(model)}
    plan = Plan(name, sites)
    with masked(model, plan):
        assert torch.equal(logits(model, batch), expected)
    remove_units(model, plan)
    assert torch.equal(logits(model, batch), expected)
    assert [id(p) for p in model.parameters()] == ids
    assert getattr(model.config, "quantization_config", None) is None
    assert "quantization_config" not in model.config.to_dict()


@families
def test_a_plan_for_other_widths_is_refused(name, tiny, uneven_plan, inputs_for, logits):
    model, batch = tiny(name), inputs_for(name)
    plan = uneven_plan(model)
    remove_units(model, plan)
    expected = logits(model, batch)
    site = next(iter(plan.sites))
    item = plan.sites[site]
    text = f"{site}: the plan was made for {item.units} heads, the model has {len(item.kept)} heads"
    with pytest.raises(PlanError, match=text):
        remove_units(model, plan)
    with pytest.raises(PlanError, match=text):
        close_gates(model, plan)
    assert torch.equal(logits(model, batch), expected)


@families
def test_a_plan_of_another_family_or_site_is_refused(name, tiny):
    model = tiny(name)
    with pytest.raises(PlanError, match=f"the plan is for a 't5' model, this is '{name}'"):
        remove_units(model, Plan("t5"))
    with pytest.raises(PlanError, match="the model has no site 'nowhere'"):
        remove_units(model, Plan(name, {"nowhere": SitePlan("heads", 4, (1,))}))
    site = find_sites(model)[0]
    with pytest.raises(PlanError, match=f"{site.name}: the plan keeps nothing"):
        remove_units(model, Plan(name, {site.name: SitePlan(site.kind, site.units, ())}))
    wrong = Plan(name, {site.name: SitePlan("neurons", site.units, (0,))})
    with pytest.raises(PlanError, match=f"made for {site.units} neurons"):
        remove_units(model, wrong)


def gradients(model, batch):
    model.train()
    model(**batch).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@families
def test_a_training_step_after_removal(name, tiny, pruned, inputs_for):
    batch = inputs_for(name)
    expected = set(gradients(tiny(name), batch))
    model = pruned(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = gradients(model, batch)
    assert set(found) == expected
    optimizer.step()
    for key, parameter in model.named_parameters():
        if key in found and found[key].abs().max() > 1e-5:  # key biases have a gradient of about 0
            assert not torch.equal(parameter, before[key]), key
    assert sum(g.abs().max() > 1e-5 for g in found.values()) > 0.8 * len(found)


@families
def test_attentions_and_hidden_states(name, tiny, uneven_plan, inputs_for):
    model, batch = tiny(name, "eager"), inputs_for(name)
    plan = uneven_plan(model)
    group = model.config.num_attention_heads // getattr(model.config, "num_key_value_heads", 4)
    remove_units(model, plan)
    batch.pop("labels")
    with torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    heads = [s for s in plan.sites.values() if s.kind == "heads"]
    assert [a.shape[1] for a in output.attentions] == [group * len(s.kept) for s in heads]
    assert len(output.hidden_states) == len(heads) + 1


@families
def test_gradient_checkpointing(name, pruned, inputs_for):
    batch = inputs_for(name)
    plain, checkpointed = pruned(name), pruned(name)
    new = getattr(checkpointed, "activation_checkpointing_enable", None)  # the name since 5.2x
    (new or checkpointed.gradient_checkpointing_enable)()
    for model in (plain, checkpointed):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout_prob", "attention_dropout", "dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
    ours, theirs = gradients(plain, batch), gradients(checkpointed, batch)
    assert set(ours) == set(theirs)
    for key, gradient in ours.items():
        torch.testing.assert_close(theirs[key], gradient, atol=1e-5, rtol=1e-4)


MODES = {
    "no cache": {"use_cache": False},
    "dynamic": {"use_cache": True},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beam": {"num_beams": 3},
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("mode", sorted(MODES))
def test_generate(name, mode, tiny, uneven_plan, inputs_for):
    model, batch = tiny(name), inputs_for(name)
    prompt = {
        "input_ids": batch["input_ids"].flip(1),  # left-padded
        "attention_mask": batch["attention_mask"].flip(1),
    }
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **MODES[mode],
    }
    plan = uneven_plan(model)
    dense = model.generate(**prompt, **options)
    with masked(model, plan):
        zeroed = model.generate(**prompt, **options)
    remove_units(model, plan)
    removed = model.generate(**prompt, **options)
    assert torch.equal(removed.sequences, zeroed.sequences)
    assert len(removed.logits) == len(zeroed.logits) == 6
    for ours, theirs in zip(removed.logits, zeroed.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (removed.logits[0] - dense.logits[0]).abs().max() > 1e-2


@families
def test_pruned_again_after_loading(name, pruned, uneven_plan, inputs_for, logits, tmp_path):
    model, batch = pruned(name), inputs_for(name)
    model.save_pretrained(tmp_path / "one")
    model = auto(name).from_pretrained(tmp_path / "one")
    plan = uneven_plan(model, seed=5)
    assert any(site.removed for site in plan.sites.values())
    with masked(model, plan):
        zeroed = logits(model, batch)
    remove_units(model, plan)
    removed = logits(model, batch)
    torch.testing.assert_close(removed, zeroed, atol=1e-5, rtol=0)
    save_model(model, tmp_path / "two")
    again, info = auto(name).from_pretrained(tmp_path / "two", output_loading_info=True)
    assert_complete(info)
    assert_same_parameters(again, model)
    assert torch.equal(logits(again, batch), removed)


@families
def test_one_plan_fits_the_model_with_and_without_a_head(name, tiny, uneven_plan):
    model = tiny(name)
    plan = uneven_plan(model)
    base = copy.deepcopy(base_model(model))
    remove_units(model, plan)
    remove_units(base, plan)
    for ours, theirs in zip(base.parameters(), base_model(model).parameters(), strict=True):
        assert torch.equal(ours, theirs)


@families
def test_config_describes_what_is_there(name, pruned, tmp_path):
    model = pruned(name)
    model.save_pretrained(tmp_path)
    spec = json.loads(Path(tmp_path, "config.json").read_text())["quantization_config"]
    assert set(spec) == {"quant_method", "version", "modules", "attributes"}
    assert (spec["quant_method"], spec["version"]) == ("hf_prune", 1)
    base = base_model(model)
    for module, entry in spec["modules"].items():
        count = sum(p.numel() for p in base.get_submodule(module).parameters())
        bias = base.get_submodule(module).bias
        assert count == entry["out"] * entry["in"] + (entry["out"] if bias is not None else 0)

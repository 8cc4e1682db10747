"""What holds for every family, with plans as uneven as it allows."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from tinies import CORE, DECODERS, EAGER_ONLY, EXPERTS, SEQ2SEQ, without_labels
from tinies import auto_class as auto
from transformers import AutoModel, AutoModelForCausalLM

from hf_prune.budget.costs import unit_cost
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import PlanError
from hf_prune.families import FAMILIES
from hf_prune.gates.plans import close_gates, masked
from hf_prune.measure.counts import count_encoder_parameters, count_macs, count_parameters
from hf_prune.measure.lengths import site_lengths
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import ALL_KINDS, base_model, find_sites
from hf_prune.surgery.remove import remove_units

NAMES = sorted(FAMILIES)
families = pytest.mark.parametrize("name", NAMES)
core = pytest.mark.parametrize("name", CORE)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@families
def test_half_precision_runs_on_what_measures(name, tiny):
    model = tiny(name)
    macs = count_macs(model, 8)
    assert count_macs(model.bfloat16(), 8) == macs


def all_sites(model):
    return find_sites(model, ALL_KINDS)


def assert_same_parameters(loaded, model):
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        assert tensor.device.type == "cpu", name
    for (name, ours), theirs in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def assert_same_logits(name, ours, theirs):
    """Bit-equal; but the batched products of DeBERTa round by where tensors lie in memory."""
    torch.testing.assert_close(ours, theirs, atol=1e-6 if name == "deberta-v2" else 0, rtol=0)


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


@pytest.mark.parametrize(
    ("name", "seed"), [(n, s) for n in NAMES for s in range(1 + 2 * (n in CORE))]
)
@attentions
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


HEADS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModel",
)


@families
def test_every_task_head(name, tiny, inputs_for, uneven_plan, logits, tmp_path):
    """Every head that the family has: masked equals removed, and saved equals loaded."""
    tested = 0
    for head in HEADS:
        kind, config = getattr(transformers, head), copy.deepcopy(tiny(name).config)
        if type(config) not in kind._model_mapping:
            continue
        if head == "AutoModelForQuestionAnswering":
            config.num_labels = 2
        model, batch = kind.from_config(config).eval(), inputs_for(name)
        if head not in ("AutoModel", "AutoModelForCausalLM"):
            batch.pop("labels", None)
        if "input_ids" in batch:
            batch["input_ids"][:, -1] = (
                getattr(model.config, "eos_token_id", None) or 2
            )  # some heads pool this token
        plan = uneven_plan(model)
        with masked(model, plan):
            zeroed = logits(model, batch)
        remove_units(model, plan)
        removed = logits(model, batch)
        torch.testing.assert_close(removed, zeroed, atol=1e-5, rtol=0)
        model.save_pretrained(tmp_path / head)
        loaded, info = kind.from_pretrained(tmp_path / head, output_loading_info=True)
        assert_complete(info)
        torch.testing.assert_close(logits(loaded, batch), removed, atol=1e-6, rtol=0)
        tested += 1
    assert tested >= 1


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_cross_attention(name, tiny, uneven_plan, tmp_path):
    """Of decoders whose config asks for it: its heads are units of their own."""
    config = copy.deepcopy(tiny(name).config)
    config.update({"is_decoder": True, "add_cross_attention": True})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 99, (2, 6), generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
    }
    plan = uneven_plan(model)
    assert any("crossattention" in site for site in plan.sites)
    with torch.no_grad():
        dense = model(**batch).logits
        with masked(model, plan):
            zeroed = model(**batch).logits
        remove_units(model, plan)
        removed = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(**batch).logits
    torch.testing.assert_close(removed, zeroed, atol=1e-5, rtol=0)
    assert (removed - dense).abs().max() > 1e-3
    assert torch.equal(loaded, removed)


def test_gated_t5(uneven_plan, inputs_for, logits):
    """The feed-forward blocks of T5 1.1 have another layout; the config tells."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=99, **sizes, feed_forward_proj="gated-gelu")
    model, batch = auto("t5").from_config(config).eval(), inputs_for("t5")
    plan = uneven_plan(model)
    with masked(model, plan):
        zeroed = logits(model, batch)
    remove_units(model, plan)
    torch.testing.assert_close(logits(model, batch), zeroed, atol=1e-5, rtol=0)
    assert model.encoder.block[0].layer[1].DenseReluDense.wi_1.out_features < 48


@families
def test_removed_units_are_the_right_rows_and_columns(name, tiny, uneven_plan):
    """Every width that is left, without the help of the forward pass."""
    model = tiny(name)
    plan = uneven_plan(model)
    remove_units(model, plan)
    for site in all_sites(model):
        assert site.units == len(plan.sites[site.name].kept)


@pytest.mark.parametrize(
    ("name", "attention"), [(n, "sdpa") for n in NAMES] + [(n, "eager") for n in CORE]
)
def test_saved_equals_loaded(name, attention, pruned, inputs_for, logits, tmp_path):
    model, batch = pruned(name, attention), inputs_for(name)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    for cls in (type(model), auto(name)):
        loaded, info = cls.from_pretrained(
            tmp_path,
            output_loading_info=True,
            attn_implementation="eager" if name in EAGER_ONLY else attention,
        )
        assert_complete(info)
        assert type(loaded) is type(model)
        assert_same_parameters(loaded, model)
        assert_ordinary(loaded)
        assert not loaded.training
        assert_same_logits(name, logits(loaded, batch), expected)


def without_dtype(config):
    """Parts of a config have a dtype of their own only once they were loaded."""
    return {
        key: without_dtype(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "dtype"
    }


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
    assert_same_logits(name, logits(twice, batch), logits(model, batch))
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two")]
    assert without_dtype(configs[0]) == without_dtype(configs[1])


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
    for tensor in rounded.state_dict(keep_vars=True).values():  # not rotary frequencies
        tensor.data = tensor.data.to(torch.bfloat16)
    for (key, ours), theirs in zip(rounded.named_parameters(), loaded.parameters(), strict=True):
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(ours, theirs), key
    if name not in EXPERTS:  # which were built with another kernel than they load with
        assert_same_logits(name, logits(loaded, batch), logits(rounded, batch))
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
    if base is model and type(loaded) is not type(model):
        return  # T5 has no base model inside of its task models: its own output is the task's
    inputs = without_labels(model, batch)
    with torch.no_grad():
        ours, theirs = base(**inputs)[0], loaded.eval()(**inputs)[0]
    assert_same_logits(name, ours, theirs)


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
    model, tokens = tiny(name), 9  # other than patches and frames
    sites, plan = all_sites(model), uneven_plan(model)
    seen = site_lengths(model, sites, tokens)
    dense = count_parameters(model), count_encoder_parameters(model), count_macs(model, tokens)
    remove_units(model, plan)
    gone = {site.name: len(plan.sites[site.name].removed) for site in sites}
    if name in EXPERTS:  # an expert that goes takes the removed rows of the others along
        for site in sites:
            if site.kind == "expert_neurons":
                both = gone[site.name] * gone[site.name.replace(".ffn", ".experts")] * 3 * 32
                dense = (dense[0] + both, dense[1] + both, dense[2])
    parameters = sum(gone[site.name] * unit_cost(site, "parameters", seen) for site in sites)
    macs = sum(gone[site.name] * unit_cost(site, "macs", seen) for site in sites)
    assert dense[0] - count_parameters(model) == parameters > 0
    assert dense[1] - count_encoder_parameters(model) == parameters
    if name != "deberta-v2":  # its positions cost more than the tokens do
        assert dense[2] - count_macs(model, tokens) == macs > 0


@families
def test_a_plan_that_keeps_everything_changes_nothing(name, tiny, inputs_for, logits):
    model, batch = tiny(name), inputs_for(name)
    expected, ids = logits(model, batch), [id(p) for p in model.parameters()]
    sites = {s.name: SitePlan(s.kind, s.units, tuple(range(s.units))) for s in all_sites(model)}
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
    with pytest.raises(PlanError, match=f"the plan is for a 't6' model, this is '{name}'"):
        remove_units(model, Plan("t6"))
    with pytest.raises(PlanError, match="the model has no site 'nowhere'"):
        remove_units(model, Plan(name, {"nowhere": SitePlan("heads", 4, (1,))}))
    site = find_sites(model)[0]
    wrong = Plan(name, {site.name: SitePlan("neurons", site.units, (0,))})
    with pytest.raises(PlanError, match=f"made for {site.units} neurons"):
        remove_units(model, wrong)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_have_a_floor(name, tiny):
    """A token is sent to two experts, and grouped products need rows of 16 bytes."""
    model = tiny(name)
    neurons, experts = find_sites(model, ["expert_neurons", "experts"])[:2]
    for site, kept, least in ((experts, (1,), 2), (neurons, (0, 1, 2), 8)):
        text = f"{site.name}: the plan keeps {len(kept)} {site.kind}. At least {least} must stay"
        with pytest.raises(PlanError, match=text):
            remove_units(model, Plan(name, {site.name: SitePlan(site.kind, site.units, kept)}))


def gradients(model, batch):
    model.train()
    if "labels" in batch:
        model(**batch).loss.backward()
    else:
        output = model(**batch)
        output["logits_per_image" if "logits_per_image" in output else 0].square().mean().backward()
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


@pytest.mark.parametrize("name", [n for n in NAMES if n != "clip"])  # which has two of each
def test_attentions_and_hidden_states(name, tiny, uneven_plan, inputs_for):
    model, batch = tiny(name, "eager"), inputs_for(name)
    plan = uneven_plan(model)
    sites = find_sites(model, ["heads"])
    remove_units(model, plan)
    with torch.no_grad():
        inputs = without_labels(model, batch)
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    expected = {s.name: [s.gate.width // 8 * len(plan.sites[s.name].kept)] * s.runs for s in sites}
    named = {key: value for key, value in output.items() if key.endswith("attentions") and value}
    found = {key: [each.shape[1] for each in value] for key, value in named.items()}
    if name not in SEQ2SEQ:
        assert found == {"attentions": [heads for each in expected.values() for heads in each]}
        assert len(output.hidden_states) == len(found["attentions"]) + 1
        return
    where = {
        "encoder_attentions": [n for n in expected if n.startswith("encoder.")],
        "cross_attentions": [n for n in expected if "encoder_attn" in n or "EncDec" in n],
        "decoder_attentions": [
            n for n in expected if n.startswith("decoder.") and ("self_attn" in n or "Self" in n)
        ],
    }
    assert found == {key: [h for n in names for h in expected[n]] for key, names in where.items()}


@families
def test_gradient_checkpointing(name, pruned, inputs_for):
    batch = inputs_for(name)
    plain, checkpointed = pruned(name), pruned(name)
    if not plain.supports_gradient_checkpointing:
        pytest.skip("transformers has no gradient checkpointing for it")
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


STATIC = {"cache_implementation": "static", "disable_compile": True}
MODES = {
    "no cache": {"use_cache": False},
    "dynamic": {"use_cache": True},
    "static": STATIC,
    "static, prefilled in chunks": {**STATIC, "prefill_chunk_size": 4},
    "beam": {"num_beams": 3},
}


def prompt_of(name, inputs_for):
    prompt = inputs_for(name)
    del prompt["labels"]
    if name in DECODERS:
        prompt = {key: value.flip(1) for key, value in prompt.items()}  # left-padded
    return prompt


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_generate(name, mode, tiny, uneven_plan, inputs_for):
    if name in SEQ2SEQ and "chunks" in mode:
        pytest.skip("a decoder that begins with one token has nothing to prefill")
    model, prompt = tiny(name), prompt_of(name, inputs_for)
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


def empty_plan(model, kind, layer):
    """All units of a kind of one layer go, and of each other site every second one."""
    sites = {}
    for site in find_sites(model):
        kept = range(0, site.units, 2)
        kept = () if (site.kind, site.layer) == (kind, layer) else tuple(kept)
        sites[site.name] = SitePlan(site.kind, site.units, kept)
    return Plan(model.config.model_type, sites)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@families
def test_a_block_without_units(name, kind, tiny, inputs_for, logits, tmp_path):
    """Also in the first layer, from which a decoder reads how much is in its cache."""
    model, batch = tiny(name), inputs_for(name)
    plan = empty_plan(model, kind, 0)
    with masked(model, plan):
        zeroed = logits(model, batch)
    pruned = tiny(name)
    remove_units(pruned, plan)
    torch.testing.assert_close(logits(pruned, batch), zeroed, atol=1e-5, rtol=0)
    assert len(find_sites(pruned)) == sum(bool(site.kept) for site in plan.sites.values())
    pruned.save_pretrained(tmp_path)
    options = {"attn_implementation": "eager"} if name in EAGER_ONLY else {}
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert_complete(info)
    assert_same_parameters(loaded, pruned)
    torch.testing.assert_close(logits(loaded, batch), zeroed, atol=1e-5, rtol=0)
    gradients(loaded, batch)
    if name in (*DECODERS, *SEQ2SEQ):
        loaded.eval()
        for mode in ("dynamic", "static"):
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **MODES[mode]}
            options |= {"output_logits": True, "return_dict_in_generate": True}
            prompt = prompt_of(name, inputs_for)
            ours = loaded.generate(**prompt, **options)
            with masked(model, plan):
                theirs = model.generate(**prompt, **options)
            for one, other in zip(ours.logits, theirs.logits, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_blocks_without_units_in_turn(name, tiny, inputs_for, logits, tmp_path):
    """What a first pruning has emptied stays so in a second one that empties the rest."""
    model, batch = tiny(name), inputs_for(name)
    remove_units(model, empty_plan(model, "heads", 0))
    model.save_pretrained(tmp_path / "one")
    model = auto(name).from_pretrained(tmp_path / "one")
    plan = empty_plan(model, "heads", 1)
    with masked(model, plan):
        zeroed = logits(model, batch)
    remove_units(model, plan)
    assert not find_sites(model, ["heads"]) or name == "gpt2"  # which has a third layer
    model.save_pretrained(tmp_path / "two")
    loaded = auto(name).from_pretrained(tmp_path / "two")
    torch.testing.assert_close(logits(loaded, batch), zeroed, atol=1e-5, rtol=0)


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
    assert_same_logits(name, logits(again, batch), removed)


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
    tables = {"modules", "attributes"}
    tables |= {"parameters"} if name in EXPERTS else set()
    tables |= {"heads"} if name in ("t5", "mpnet") else set()
    assert set(spec) == {"quant_method", "version", *tables}
    assert (spec["quant_method"], spec["version"]) == ("hf_prune", 1)
    base = base_model(model)
    for module, entry in spec["modules"].items():
        count = sum(p.numel() for p in base.get_submodule(module).parameters())
        bias = base.get_submodule(module).bias
        assert count == entry["out"] * entry["in"] + (entry["out"] if bias is not None else 0)

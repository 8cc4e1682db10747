"""Single query heads under grouped queries: masked equals removed, saved equals loaded."""

import json
import random

import pytest
import torch
from tinies import EAGER_ONLY, auto_class

from hf_prune import compress
from hf_prune.errors import CheckpointError, ConfigError, PlanError
from hf_prune.gates.plans import masked
from hf_prune.measure.counts import count_parameters
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import load_recipe
from hf_prune.sites import HIDDEN, QUERY_HEADS, find_sites
from hf_prune.surgery.remade import UnevenGroups
from hf_prune.surgery.remove import remove_units

GROUPED = (
    *("phi", "phi3", "llama", "mistral", "qwen2", "qwen3", "smollm3"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "mixtral", "qwen3_moe"),
)
MODES = {
    "no cache": {"use_cache": False},
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked": {
        "cache_implementation": "static",
        "disable_compile": True,
        "prefill_chunk_size": 4,
    },
}


def plan_of(model, *kept):
    """So many query heads, or those, in each layer in turn; and half of the neurons."""
    sites, generator = {}, random.Random(0)
    for site in find_sites(model, [QUERY_HEADS]):
        here = kept[site.layer % len(kept)]
        if isinstance(here, int):
            here = tuple(sorted(generator.sample(range(site.units), here)))
        sites[site.name] = SitePlan(QUERY_HEADS, site.units, here)
    for site in find_sites(model, ["neurons"]):
        sites[site.name] = SitePlan("neurons", site.units, tuple(range(0, site.units, 2)))
    return Plan(model.config.model_type, sites)


def attention_modules(model):
    base = model.base_model
    return [base.get_submodule(site.core) for site in find_sites(model, ["heads"])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GROUPED)
def test_uneven_groups(name, attention, tiny, inputs_for, logits, tmp_path):
    """Two query heads of one group and one of the other; in the next layer one group goes."""
    model, batch = tiny(name, attention), inputs_for(name)
    dense, plan = logits(model, batch), plan_of(model, (0, 2, 3), (2, 3))
    prompt = {k: v.flip(1) for k, v in batch.items() if k != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with masked(model, plan):
        zeroed, expected = logits(model, batch), model.generate(**prompt, **options)
    remove_units(model, plan)
    removed = logits(model, batch)
    torch.testing.assert_close(removed, zeroed, atol=1e-5, rtol=1e-5)
    assert (removed - dense).abs().max() > 1e-2
    first, second = attention_modules(model)[:2]
    assert isinstance(first, UnevenGroups)
    assert first.reads == [0, 1, 1]
    assert second.num_key_value_groups == 2
    assert not isinstance(second, UnevenGroups), "one group of two is what the class can do"
    model.save_pretrained(tmp_path)
    attention = "eager" if name in EAGER_ONLY else attention
    loaded, info = auto_class(name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=attention
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded, batch), removed)
    for more in MODES.values():
        found = loaded.generate(**prompt, **options, **more)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_pruned_again(name, tiny, inputs_for, logits):
    """What is left of uneven groups are single query heads, whatever is asked for."""
    model, batch = tiny(name), inputs_for(name)
    first = plan_of(model, (0, 2, 3))
    remove_units(model, first)
    sites = find_sites(model, ["heads"])
    assert [(site.kind, site.units, site.reads) for site in sites] == [
        (QUERY_HEADS, 3, (0, 1, 1))
    ] * 2
    sites_left = {s.name: SitePlan(QUERY_HEADS, 3, (0, 1)) for s in sites}
    second = Plan(model.config.model_type, sites_left)
    with masked(model, second):
        zeroed = logits(model, batch)
    remove_units(model, second)
    torch.testing.assert_close(logits(model, batch), zeroed, atol=1e-5, rtol=1e-5)
    both = first.then(second)
    again = tiny(name)
    remove_units(again, both)
    torch.testing.assert_close(logits(again, batch), zeroed, atol=1e-5, rtol=1e-5)


def test_with_the_hidden_width_and_all_of_a_layer(tiny, inputs_for, logits, tmp_path):
    model, batch = tiny("llama"), inputs_for("llama")
    plan = plan_of(model, (), (1, 2, 3))
    channels = SitePlan(HIDDEN, 32, tuple(range(0, 32, 3)))
    plan = Plan("llama", {**plan.sites, HIDDEN: channels})
    with masked(model, plan):
        zeroed = logits(model, batch)
    remove_units(model, plan)
    torch.testing.assert_close(logits(model, batch), zeroed, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = auto_class("llama").from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_still_trains(name, tiny, inputs_for):
    model, batch = tiny(name), inputs_for(name)
    remove_units(model, plan_of(model, 3))
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model(**batch).loss.backward()
    module = attention_modules(model)[0]
    assert module.q_proj.weight.grad.abs().sum() > 0
    assert module.k_proj.weight.grad.abs().sum() > 0


def test_models_whose_heads_have_their_own_keys_have_none(tiny):
    for name in ("bert", "gpt2", "t5", "opt"):
        assert find_sites(tiny(name), [QUERY_HEADS]) == []


def test_heads_or_query_heads(tiny):
    model = tiny("llama")
    (site, *_), (other, *_) = find_sites(model, ["heads"]), find_sites(model, [QUERY_HEADS])
    sites = {
        site.name: SitePlan("heads", site.units, (0,)),
        other.name: SitePlan(QUERY_HEADS, other.units, (0, 1)),
    }
    with pytest.raises(PlanError, match=r"plan heads or query heads of an attention, not both"):
        remove_units(model, Plan("llama", sites))


@pytest.mark.parametrize(
    ("reads", "text"),
    [
        ([0, 2, 2], "none left out"),
        ([1, 0, 0], "none left out"),
        ([0, 1, 0], "none left out"),
        ([0, 1, 2], "the model has 2 key/value heads"),
        ([0, True], "none left out"),
        ([0, 0, 0, 0, 1], "does not fit"),
        ([0, 1 << 60], "none left out"),
        ([], "none left out"),
        ("01", "none left out"),
    ],
)
def test_what_a_file_says_is_checked(reads, text, tiny, tmp_path):
    model = tiny("llama")
    remove_units(model, plan_of(model, (0, 2, 3)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["groups"]["layers.0.self_attn"]["reads"] = reads
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=text):
        auto_class("llama").from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_a_recipe_asks_for_them(name, tiny, inputs_for, logits):
    """Scored, solved and re-fitted like heads, and better than without the re-fit."""
    dense = tiny(name)
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 6) for seed in range(5)]
    stage = {"stage": "prune", "units": ["query_heads", "neurons"], "sparsity": 0.4}
    losses = []
    for reconstruct in (True, False):
        recipe = {"stages": [{**stage, "reconstruct": reconstruct}]}
        result = compress(dense, recipe, batches)
        assert {site.kind for site in result.plan.sites.values()} == {QUERY_HEADS, "neurons"}
        assert any(0 < len(s.kept) < s.units for s in result.plan.sites.values())
        entry = result.report["pruning"][0]
        assert entry["met"]
        gone = count_parameters(dense) - count_parameters(result.model)
        assert gone >= entry["removed"], "keys and values that nobody reads go, too"
        other = inputs_for(name, 99, (9, 6, 4, 7) * 6)
        losses.append(float((logits(result.model, other) - logits(dense, other)).square().mean()))
    assert losses[0] < losses[1], losses


def test_heads_and_query_heads_in_one_stage_are_refused():
    stage = {"stage": "prune", "units": ["heads", "query_heads"], "sparsity": 0.4}
    with pytest.raises(ConfigError, match="name heads, with their keys and values, or single"):
        load_recipe({"stages": [stage]})

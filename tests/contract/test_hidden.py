"""The hidden width of every family: masked equals removed, saved equals loaded, counted exactly."""

import random

import pytest
import torch
from tinies import DECODERS, EAGER_ONLY, SEQ2SEQ, auto_class

from hf_prune.budget.costs import cost_tables
from hf_prune.errors import UnsupportedModelError
from hf_prune.families import FAMILIES
from hf_prune.gates.plans import masked
from hf_prune.measure.counts import count_parameters
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import HIDDEN, find_sites
from hf_prune.surgery.remove import remove_units

REFUSED = {
    "clip": "beside vision_config",
    "gemma3": "beside vision_config",
    "wav2vec2": "over the hidden width, which cannot be narrowed",
    "whisper": "encoder.conv2 is a Conv1d over the hidden width",
}
NAMES = sorted(set(FAMILIES) - set(REFUSED))


def hidden_plan(model, keep=21, seed=0):
    (site,) = find_sites(model, [HIDDEN])
    keep = -(-keep // site.multiple) * site.multiple
    kept = tuple(sorted(random.Random(seed).sample(range(site.units), keep)))
    return Plan(model.config.model_type, {HIDDEN: SitePlan(HIDDEN, site.units, kept)})


@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_removed_and_saved_equals_loaded(name, tiny, inputs_for, logits, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    dense, total = logits(model, batch), count_parameters(model)
    (site,) = find_sites(model, [HIDDEN])
    table = cost_tables([site], "parameters", 1)[HIDDEN]
    plan = hidden_plan(model)
    with masked(model, plan):
        zeroed = logits(model, batch)
    assert torch.equal(logits(model, batch), dense), "opened gates leave no trace"
    remove_units(model, plan)
    removed = logits(model, batch)
    if removed.shape == zeroed.shape:  # a base model gives the channels themselves
        torch.testing.assert_close(removed, zeroed, atol=1e-5, rtol=1e-5)
        assert (removed - dense).abs().max() > 1e-2
    else:
        kept = list(plan.sites[HIDDEN].kept)
        torch.testing.assert_close(removed, zeroed[..., kept], atol=1e-5, rtol=1e-5)
    left = len(plan.sites[HIDDEN].kept)
    assert total - count_parameters(model) == table[-1] - table[left] > 0
    assert find_sites(model, [HIDDEN])[0].units == left
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": "eager"} if name in EAGER_ONLY else {}
    loaded, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded, batch), removed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n in (*DECODERS, *SEQ2SEQ)])
def test_with_heads_and_neurons(name, tiny, uneven_plan, inputs_for, logits, tmp_path):
    """In one plan; then generate from what was loaded, in a cache of each kind."""
    model = tiny(name)
    plan = uneven_plan(model)
    plan = Plan(plan.model_type, {**plan.sites, **hidden_plan(model, 27).sites})
    prompt = {k: v for k, v in inputs_for(name).items() if k != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with masked(model, plan):
        expected = model.generate(**prompt, **options)
    remove_units(model, plan)
    model.save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path).eval()
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = loaded.generate(**prompt, **options, **more)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_narrowed_is_refused(name, tiny):
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        find_sites(tiny(name), [HIDDEN])

"""The re-fit of a narrowed hidden width."""

import pytest
import torch

from hf_prune import compress
from hf_prune.errors import ConfigError
from hf_prune.families import FAMILIES
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import HIDDEN, find_sites
from hf_prune.surgery.dense import dense_targets
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.width import _fit_channels, refit_width

REFUSED = (
    "clip",
    "gemma3",
    "wav2vec2",
    "whisper",
    "albert",
    "clip_text_model",
    "clip_vision_model",
)
NAMES = sorted(set(FAMILIES) - set(REFUSED))


def kept_of(model, left):
    (site,) = find_sites(model, [HIDDEN])
    step = site.multiple
    return tuple(range(0, left // step * step)), site.units


@pytest.mark.parametrize("name", NAMES)
def test_it_repairs(name, tiny, inputs_for, logits):
    """On examples that it has not seen."""
    dense, model, plain = tiny(name), tiny(name), tiny(name)
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 8) for seed in range(6)]
    kept, units = kept_of(model, 28)
    plan = Plan(model.config.model_type, {HIDDEN: SitePlan(HIDDEN, units, kept)})
    remove_units(model, plan)
    remove_units(plain, plan)
    fitted = refit_width(model, dense_targets(dense, batches), kept)
    sites = find_sites(model)
    assert {site.gate.module for site in sites} <= set(fitted)
    assert len(fitted) > 2 * len(sites)
    other = inputs_for(name, 99, (9, 6, 4, 7) * 8)
    wanted = logits(dense, other)
    losses = [float((logits(m, other) - wanted).square().mean()) for m in (model, plain)]
    assert losses[0] < 0.9 * losses[1], losses


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "gemma2", "distilbert"])
def test_nothing_removed_nothing_changed(name, tiny, inputs_for, logits):
    dense, model = tiny(name), tiny(name)
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 8) for seed in range(3)]
    refit_width(model, dense_targets(dense, batches), tuple(range(32)))
    torch.testing.assert_close(
        logits(model, batches[0]), logits(dense, batches[0]), atol=1e-3, rtol=1e-3
    )


def test_channels_get_the_scale_and_shift_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.LayerNorm(5)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(5, generator=generator) + 0.5)
        norm.bias.copy_(torch.rand(5, generator=generator))
        inputs = torch.randn(200, 5, generator=generator)
        y, t = norm(inputs), torch.randn(200, 5, generator=generator) + inputs
        _fit_channels(norm, [(y[:120], t[:120]), (y[120:], t[120:])])
        found = norm(inputs)
    for channel in range(5):
        design = torch.stack([y[:, channel], torch.ones(200)], dim=1)
        wanted = design @ torch.linalg.lstsq(design, t[:, channel]).solution
        torch.testing.assert_close(found[:, channel], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_recipe_asks_for_it(name, tiny, inputs_for, tmp_path):
    model, batches = tiny(name), [inputs_for(name, seed) for seed in range(4)]
    stage = {"stage": "prune", "units": ["hidden"], "sparsity": 0.3, "round_to": 4}
    result = compress(model, {"stages": [stage]}, batches)
    left = len(result.plan.sites[HIDDEN].kept)
    assert left % 4 == 0
    assert find_sites(result.model, [HIDDEN])[0].units == left < 32
    entry = result.report["pruning"][0]
    gone = result.report["stages"]["dense"]["parameters"]
    gone -= result.report["stages"]["pruned"]["parameters"]
    assert entry["removed"] == gone >= entry["asked_to_remove"]
    again = compress(model, {"stages": [stage]}, batches)
    assert again.plan == result.plan


def test_a_criterion_of_one_projection_is_refused(tiny, inputs_for):
    stage = {"stage": "prune", "units": ["hidden"], "sparsity": 0.3, "criterion": "kfac_obs"}
    with pytest.raises(ConfigError, match=r"many read the hidden width\. Use fisher"):
        compress(tiny("bert"), {"stages": [stage]}, [inputs_for("bert")] * 3)


@pytest.mark.parametrize("first", ["hidden", "heads"])
def test_stages_before_and_after_it(first, tiny, inputs_for, logits):
    """Each re-fit aims at something of its own width."""
    model, batches = tiny("llama"), [inputs_for("llama", seed) for seed in range(5)]
    stages = [
        {"stage": "prune", "units": ["hidden"], "sparsity": 0.2},
        {"stage": "prune", "units": ["query_heads", "neurons"], "sparsity": 0.3},
    ]
    order = stages if first == "hidden" else stages[::-1]
    result = compress(model, {"stages": order}, batches)
    assert all(entry["refitted"] for entry in result.report["pruning"])
    plain = [{**stage, "reconstruct": False} for stage in order]
    worse = compress(model, {"stages": plain}, batches)
    other = inputs_for("llama", 99, (9, 6, 4, 7) * 8)
    wanted = logits(model, other)
    losses = [
        float((logits(each.model, other) - wanted).square().mean()) for each in (result, worse)
    ]
    assert losses[0] < losses[1], losses

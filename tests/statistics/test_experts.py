"""Scores of experts and of their neurons, against finite differences; and what goes end to end."""

import pytest
import torch
from tinies import EXPERTS
from transformers import AutoModelForCausalLM

from hf_prune import compress, save_result
from hf_prune.criteria import CRITERIA, needs
from hf_prune.errors import ConfigError
from hf_prune.recipe import load_recipe
from hf_prune.sites import EXPERT_KINDS, base_model, find_sites, get_parameter
from hf_prune.statistics.batches import one_by_one
from hf_prune.statistics.collect import INPUTS, UNSEEN, collect
from hf_prune.statistics.projection import project_output
from hf_prune.statistics.score import score

families = pytest.mark.parametrize("name", EXPERTS)
kinds = pytest.mark.parametrize("kind", EXPERT_KINDS)
STEP = 3e-3  # some layers compute in float32 whatever the weights


def slopes(model, site, example, seed):
    """By unit, how loss and projection move as what the unit gives is scaled."""
    output = model(**example, use_cache=False)
    (direction,) = torch.autograd.grad(
        project_output(model, example, output, seed).sum(), output.logits
    )
    parameter = get_parameter(base_model(model), site.gate).data
    found = torch.zeros(2, site.units, dtype=torch.float64)
    for unit in range(site.units):
        part = parameter.select(site.gate.axis, unit)
        whole = part.clone()
        for sign in (1, -1):
            part.copy_(whole * (1 + sign * STEP))
            with torch.no_grad():
                output = model(**example, use_cache=False)
                projected = (direction * output.logits).sum()
            found[:, unit] += sign * torch.stack([output.loss, projected]).double() / (2 * STEP)
        part.copy_(whole)
    return found


@families
@kinds
def test_scores_are_slopes_of_what_units_give(tiny, inputs_for, name, kind):
    model, batch = tiny(name).double(), inputs_for(name, seed=3)
    sites = find_sites(model, [kind])
    names = ("gate_grad", "gate_grad_signed", "projected_fisher", "gate_square")
    found = collect(model, sites, [batch], names, seed=5)
    for site in sites:
        each = [slopes(model, site, one, 5) for one in one_by_one(model, batch)]
        loss, projection = (torch.stack([e[i] for e in each]) for i in (0, 1))  # [examples, U]
        expected = {
            "gate_grad": loss.abs().mean(dim=0),
            "gate_grad_signed": loss.mean(dim=0),
            "projected_fisher": projection.square().mean(dim=0),
            "gate_square": loss.square().mean(dim=0),
        }
        for statistic, value in expected.items():
            torch.testing.assert_close(
                found[site.name][statistic],
                value,
                rtol=1e-2,
                atol=1e-4,
                msg=lambda text, s=statistic: f"{s}: {text}",
            )
        assert float(expected["projected_fisher"].max()) > 1e-4, "there is something to see"


@kinds
def test_squared_gradients_of_fused_parameters(tiny, inputs_for, kind):
    model, batch = tiny("mixtral"), inputs_for("mixtral", seed=1)
    sites = find_sites(model, [kind, "heads"])
    found = collect(model, sites, [batch], ["weight_grad_square"])
    frozen = tiny("mixtral").requires_grad_(False)
    again = collect(frozen, sites, [batch], ["weight_grad_square"])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    (site,) = [s for s in sites if s.kind == kind and s.layer == 1]
    parameter = get_parameter(base_model(model), site.gate)
    total = torch.zeros_like(parameter)
    for one in one_by_one(model, batch):
        model.zero_grad()
        model(**one, use_cache=False).loss.backward()
        total += parameter.grad.square() / len(batch["input_ids"])
    expected = torch.stack(
        [total.select(site.gate.axis, unit).flatten() for unit in range(site.units)]
    )
    torch.testing.assert_close(
        found[site.name]["weight_grad_square"].float(), expected, rtol=1e-3, atol=1e-9
    )
    for name, values in found.items():
        torch.testing.assert_close(again[name], values)


@kinds
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_a_criterion_works_or_is_refused(tiny, inputs_for, kind, criterion):
    model, batches = tiny("mixtral"), [inputs_for("mixtral")]
    sites, wanted = find_sites(model, [kind]), needs(CRITERIA[criterion])
    if set(wanted) & UNSEEN:
        with pytest.raises(ConfigError, match=r"fused experts do not show .* by 'fisher'"):
            collect(model, sites, batches, wanted)
        assert criterion == "activation_norm" or "obs" in criterion
        return
    rankings = score(model, sites, criterion, collect(model, sites, batches, wanted))
    for site in sites:
        assert sorted(rankings[site.name].order.tolist()) == list(range(site.units))
    assert not set(wanted) & INPUTS


@families
@kinds
@pytest.mark.parametrize("solver", ["knapsack", "global", "uniform", "top_down"])
def test_experts_in_a_recipe(tiny, inputs_for, name, kind, solver):
    model, batches = tiny(name), [inputs_for(name, s) for s in range(3)]
    stage = {"stage": "prune", "units": ["heads", kind], "solver": solver, "sparsity": 0.3}
    recipe = load_recipe({"stages": [{**stage, "sequence_length": 8}]})
    assert recipe.prune_stages[0].criterion == "fisher"
    result = compress(model, recipe, batches)
    (entry,) = result.report["pruning"]
    gone = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in result.model.parameters()
    )
    assert entry["met"]
    assert entry["removed"] == gone, "what the budget counts is what is gone"
    for site in find_sites(model, [kind]):
        kept = len(result.plan.sites[site.name].kept)
        assert kept >= site.floor
        assert kept % site.multiple == 0


def test_what_comes_after_narrowed_experts_is_re_fitted(tiny, inputs_for):
    model, batches = tiny("mixtral"), [inputs_for("mixtral", s) for s in range(4)]
    stage = {"stage": "prune", "units": ["experts"], "sparsity": 0.4, "sequence_length": 8}
    result = compress(model, {"stages": [stage]}, batches)
    (entry,) = result.report["pruning"]
    assert entry["refitted"] == 1, "attention of the second layer"


def test_a_model_without_experts(tiny, inputs_for):
    stage = {"stage": "prune", "units": ["experts"], "sparsity": 0.5}
    with pytest.raises(ConfigError, match=r"no units of \['experts'\]"):
        compress(tiny("bert"), {"stages": [stage]}, [inputs_for("bert", s) for s in range(3)])


@kinds
def test_what_is_left_is_saved_drawn_and_loaded(tiny, inputs_for, tmp_path, kind):
    model, batches = tiny("qwen3_moe"), [inputs_for("qwen3_moe", s) for s in range(3)]
    stage = {"stage": "prune", "units": ["heads", kind], "sparsity": 0.3, "sequence_length": 8}
    result = compress(model, {"stages": [stage]}, batches)
    save_result(result, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    with torch.no_grad():
        ours, theirs = (m.eval()(**batches[0]).logits for m in (loaded, result.model))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    (drawn,) = (tmp_path / "out").rglob("*.svg")
    title = "Experts kept" if kind == "experts" else "Neurons of experts kept"
    assert f"<!-- {title} -->" in drawn.read_text(encoding="utf-8")

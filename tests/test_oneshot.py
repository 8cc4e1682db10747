"""One analysis, many targets; and the smallest model above a floor."""

import re

import numpy as np
import pytest
import torch

from hf_prune import compress, compress_family, oneshot, save_result, targets
from hf_prune.errors import ConfigError, DataError
from hf_prune.measure.counts import count_parameters
from hf_prune.measure.latency_table import LatencyTable, _group
from hf_prune.pipeline import prune_further
from hf_prune.plan import rename_layers
from hf_prune.search import levels
from hf_prune.sites import find_sites
from hf_prune.targets import Chooser

STAGE = {"stage": "prune", "sequence_length": 16}


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_family_is_what_compress_gives_for_each(tiny, inputs_for, name, monkeypatch):
    model, batches = tiny(name), [inputs_for(name, s) for s in range(6)]
    passes = []
    collect = __import__("hf_prune.oneshot", fromlist=["collect"]).collect
    monkeypatch.setattr(
        "hf_prune.oneshot.collect", lambda *a, **k: passes.append(1) or collect(*a, **k)
    )
    targets = [0.3, 0.5, {"macs": "0.6x"}]
    family = compress_family(
        model, {"stages": [{**STAGE, "sparsity": 0.1}]}, batches, targets=targets
    )
    assert len(passes) == 1, "statistics are collected once"
    for target, result in zip(targets, family, strict=True):
        key = "target" if isinstance(target, dict) else "sparsity"
        alone = compress(model, {"stages": [{**STAGE, key: target}]}, batches)
        assert result.plan == alone.plan
        assert same(result.model, alone.model)
        assert result.report["stages"] == alone.report["stages"]
        assert result.recipe.prune_stages == alone.recipe.prune_stages
    assert count_parameters(family[1].model) < count_parameters(family[0].model)


@pytest.mark.parametrize("how", ["sequential", "parallel"])
def test_what_is_ignored_stays_as_it_is(tiny, inputs_for, how):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(6)]
    stage = {**STAGE, "sparsity": 0.3, "ignore": ["encoder.layer.1.*"], "reconstruction": how}
    result = compress(model, {"stages": [stage]}, batches)
    for name, value in result.model.named_parameters():
        if ".layer.1." in name:
            assert torch.equal(value, model.get_parameter(name)), name
    assert result.report["pruning"][0]["refitted"] > 0


def test_a_family_needs_one_structured_stage(tiny, inputs_for):
    stages = [{**STAGE, "sparsity": 0.1}] * 2
    with pytest.raises(ConfigError, match="one prune stage"):
        compress_family(tiny("bert"), {"stages": stages}, [inputs_for("bert")], targets=[0.5])
    floor = {**STAGE, "sparsity": 0.1, "floor": {"drop": 0.1}}
    with pytest.raises(ConfigError, match=r"a floor is for compress\(\)"):
        compress_family(tiny("bert"), {"stages": [floor]}, [inputs_for("bert")] * 2, targets=[0.5])
    with pytest.raises(ConfigError, match="a family has no size: pass targets="):
        compress_family(tiny("bert"), {"stages": stages[:1]}, [inputs_for("bert")] * 2, targets=[])
    for asked, wrong in (
        ([50.0], "outside"),
        (["3x"], "'3x' is neither a sparsity such as 0.5 nor a target"),
        ([True], "True is neither"),
        ({"speedup": "3x"}, "a family has no size: pass targets="),
    ):
        with pytest.raises(ConfigError, match=wrong):
            compress_family(
                tiny("bert"), {"stages": stages[:1]}, [inputs_for("bert")] * 2, targets=asked
            )


def test_the_smallest_model_above_the_floor(tiny, inputs_for):
    """The metric falls with the parameters: bisection finds where it meets the floor."""
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    total = count_parameters(model)

    def metric(candidate):
        return count_parameters(candidate) / total

    stage = {**STAGE, "sparsity": 0.9, "criterion": "magnitude"}
    floor = {"drop": 0.25, "trials": 9}
    result = compress(model, {"stages": [{**stage, "floor": floor}]}, batches, metric=metric)
    assert 0.75 <= metric(result.model) < 0.78
    entry = result.report["pruning"][0]
    assert entry["floor"]["least"] == 0.75
    assert len(entry["floor"]["trials"]) == 9
    assert entry["asked_to_remove"] / entry["total"] == pytest.approx(0.9, abs=1e-3)
    assert entry["removed"] < entry["asked_to_remove"]
    assert not entry["met"], "of what the stage asks for, which the floor keeps it from"
    all_of_it = compress(
        model, {"stages": [{**stage, "floor": {"drop": 1.0}}]}, batches, metric=metric
    )
    assert len(all_of_it.report["pruning"][0]["floor"]["trials"]) == 1


def test_units_that_a_model_does_not_have_are_named(tiny, inputs_for, caplog):
    for name, units, said in (
        ("mixtral", ["heads", "neurons"], "no neurons.* It also has expert_neurons, experts"),
        ("gpt2", ["query_heads", "neurons"], "no query_heads"),
    ):
        stage = {"stage": "prune", "units": units, "sparsity": 0.4, "criterion": "magnitude"}
        compress(tiny(name), {"stages": [stage | {"reconstruct": False}]})
        assert re.search(said, caplog.text)
        caplog.clear()
    compress(tiny("bert"), {"stages": [STAGE | {"sparsity": 0.4}]}, [inputs_for("bert")] * 2)
    assert "nothing of that kind" not in caplog.text


def test_sizes_of_a_family_share_a_table(tiny, inputs_for, monkeypatch):
    tables = []
    real = targets.latency_table
    monkeypatch.setattr(targets, "latency_table", lambda *a, **k: tables.append(1) or real(*a, **k))
    monkeypatch.setenv("HF_PRUNE_CACHE", "/proc/nothing")
    stage = {**STAGE, "criterion": "magnitude", "reconstruct": False, "sparsity": 0.5}
    goals = [{"speedup": "1.1x"}, {"speedup": "1.2x"}]
    compress_family(tiny("bert"), {"stages": [stage]}, [inputs_for("bert")] * 2, targets=goals)
    assert len(tables) == 1


def test_when_no_smaller_model_is_good_enough(tiny, inputs_for, caplog):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]

    def metric(candidate):
        return float(count_parameters(candidate) == count_parameters(model))

    stage = {**STAGE, "sparsity": 0.9, "floor": {"drop": 0.5, "trials": 3}}
    result = compress(model, {"stages": [stage]}, batches, metric=metric)
    assert count_parameters(result.model) == count_parameters(model)
    assert "nothing is removed" in caplog.text
    assert "removed 0: no smaller model was found above the floor" in caplog.text


@pytest.mark.parametrize("number", [float, torch.tensor, np.float32])
def test_a_metric_may_be_any_number(number, tiny, inputs_for, tmp_path):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    total = count_parameters(model)
    stage = {**STAGE, "sparsity": 0.5, "criterion": "magnitude", "floor": {"drop": 0.9}}
    result = compress(
        model, {"stages": [stage]}, batches, metric=lambda m: number(count_parameters(m) / total)
    )
    save_result(result, tmp_path / "out")
    (trial,) = result.report["pruning"][0]["floor"]["trials"]
    assert trial["metric"] == pytest.approx(count_parameters(result.model) / total)


def test_a_metric_that_is_no_number_is_named(tiny, inputs_for):
    stage = {**STAGE, "sparsity": 0.5, "floor": {"drop": 0.1}}
    batches = [inputs_for("bert", s) for s in range(4)]
    with pytest.raises(DataError, match=r"the metric gave \{'accuracy': 0.9\}"):
        compress(tiny("bert"), {"stages": [stage]}, batches, metric=lambda m: {"accuracy": 0.9})


def test_what_only_a_floor_reads_is_refused_without_one(tiny, inputs_for, tmp_path):
    stages, batches = [{**STAGE, "sparsity": 0.5}], [inputs_for("bert", s) for s in range(4)]
    for told in ({"metric": count_parameters}, {"experience": tmp_path / "runs.sqlite"}):
        with pytest.raises(ConfigError, match="are for a stage with a floor"):
            compress(tiny("bert"), {"stages": stages}, batches, **told)


def test_a_search_reads_batches_whatever_the_criterion(tiny, inputs_for):
    stage = {**STAGE, "sparsity": 0.5, "criterion": "magnitude", "reconstruct": False}
    batches = [inputs_for("bert", s) for s in range(8)]
    result = compress(tiny("bert"), {"stages": [{**stage, "search_trials": 2}]}, batches)
    assert len(result.report["pruning"][0]["search"]) == 3


@pytest.mark.parametrize("template", [None, "alternate_layers"])
def test_nothing_goes_where_nothing_stays_above_the_floor(template, tiny, inputs_for):
    """A template fixes all widths: one trial is all there is to build."""
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(3)]
    total, built = count_parameters(model), []

    def metric(candidate):
        built.append(count_parameters(candidate))
        return 1.0 if built[-1] == total else 0.0

    stage = {**STAGE, "sparsity": 0.5, "floor": {"drop": 0.01, "trials": 4}}
    if template:
        told = {"solver": "template", "template": template, "min_heads": 0, "min_neurons": 0}
        stage |= told
    result = compress(model, {"stages": [stage]}, batches, metric=metric)
    assert count_parameters(result.model) == total
    assert not any(site.removed for site in result.plan.sites.values())
    (entry,) = result.report["pruning"]
    assert entry["removed"] == 0
    assert not entry["met"]
    assert len(built) == len(set(built)), "no plan is built twice"


@pytest.mark.parametrize("reconstruction", ["sequential", "parallel"])
def test_a_second_stage_is_measured_from_the_given_model(reconstruction, tiny, inputs_for):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    total = count_parameters(model)
    first = {**STAGE, "sparsity": 0.3}
    floor = {"drop": 0.6, "trials": 3}
    second = {**STAGE, "sparsity": 0.6, "floor": floor, "reconstruction": reconstruction}
    told = {"stages": [first, second]}
    result = compress(model, told, batches, metric=lambda m: count_parameters(m) / total)
    assert result.report["pruning"][1]["floor"]["least"] == pytest.approx(0.4)


def test_training_between_stages_moves_no_target(tiny, inputs_for):
    """Two calls, as of a script that trains between them, are two stages of one recipe."""
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    plain = {**STAGE, "criterion": "magnitude", "reconstruct": False}
    first = {**plain, "units": ["heads"], "target": {"macs": "0.9x"}}
    second = {**plain, "units": ["neurons"], "target": {"macs": "0.7x"}}
    together = compress(model, {"stages": [first, second]}, batches)
    before = compress(model, {"stages": [first]}, batches)
    after = prune_further(before.model, model, {"stages": [second]}, batches)
    assert same(after.model, together.model)
    assert after.report["pruning"] != compress(before.model, {"stages": [second]}).report["pruning"]
    total = count_parameters(model)
    floor = {**STAGE, "sparsity": 0.6, "floor": {"drop": 0.6, "trials": 3}}
    found = prune_further(
        before.model,
        model,
        {"stages": [floor]},
        batches,
        metric=lambda m: count_parameters(m) / total,
    )
    assert found.report["pruning"][0]["floor"]["least"] == pytest.approx(0.4)


def test_the_level_search_of_a_second_stage_aims_at_the_given_model(tiny, inputs_for, monkeypatch):
    judged, real = [], levels.Judge

    def watches(model, batches):
        judged.append(count_parameters(model))
        return real(model, batches)

    monkeypatch.setattr(levels, "Judge", watches)
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(8)]
    stages = [{**STAGE, "sparsity": 0.3}, {**STAGE, "sparsity": 0.5, "search_trials": 2}]
    compress(model, {"stages": stages}, batches)
    assert judged == [count_parameters(model)]


@pytest.mark.parametrize("found", [1.2, 0.98])
def test_a_search_keeps_a_latency_that_was_met(tiny, inputs_for, monkeypatch, caplog, found):
    """The widths of a search are timed, too: where they are too slow, the first ones stay."""
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(8)]
    sites, shares = find_sites(model), iter([0.99, found])
    points = {_group(site): {1: 0, site.units: 300} for site in sites}
    table = LatencyTable(2000, 800, points)
    monkeypatch.setattr(targets, "latency_table", lambda *_, **__: table)
    monkeypatch.setattr(Chooser, "_measure", lambda self, counts: next(shares) / 1.5)
    other = {site.name: 2 for site in sites}
    monkeypatch.setattr(levels.LevelSearch, "run", lambda self, start, trials: other)
    stage = {**STAGE, "target": {"speedup": "1.5x"}, "search_trials": 3}
    result = compress(model, {"stages": [stage]}, batches)
    (entry,) = result.report["pruning"]
    kept = {name: len(site.kept) for name, site in result.plan.sites.items()}
    assert entry["met"]
    assert (kept == other) == (found < 1)
    assert ("+20.0 % off the latency" in caplog.text) == (found > 1)


def test_a_floor_needs_a_metric(tiny, inputs_for):
    stage = {**STAGE, "sparsity": 0.5, "floor": {"drop": 0.01}}
    with pytest.raises(ConfigError, match=r"pass compress\(\.\.\., metric="):
        compress(tiny("bert"), {"stages": [stage]}, [inputs_for("bert")] * 3)


def test_the_search_stops_when_its_time_is_over(tiny, inputs_for):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    floor = {"drop": 0.0, "trials": 50, "max_minutes": 1e-9}
    stage = {**STAGE, "sparsity": 0.5, "floor": floor}
    result = compress(model, {"stages": [stage]}, batches, metric=lambda m: -float(m is not model))
    assert len(result.report["pruning"][0]["floor"]["trials"]) == 1


def test_the_time_of_a_floor_is_that_of_the_whole_stage(tiny, inputs_for, monkeypatch):
    """Statistics that took longer leave time for a single trial."""
    original, waited = oneshot.analyse, []

    def analyse(*args, **options):
        analysis = original(*args, **options)
        analysis.seconds["statistics"] += waited[-1]
        return analysis

    monkeypatch.setattr("hf_prune.stages.analyse", analyse)
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    floor = {"drop": 0.0, "trials": 3, "max_minutes": 2.0}
    stage = {**STAGE, "sparsity": 0.5, "floor": floor}
    for seconds, trials in ((120.0, 1), (0.0, 3)):
        waited.append(seconds)
        result = compress(
            model, {"stages": [stage]}, batches, metric=lambda m: -float(m is not model)
        )
        assert len(result.report["pruning"][0]["floor"]["trials"]) == trials


def test_more_examples_for_the_refit_than_for_the_scores(tiny, inputs_for, monkeypatch):
    seen = {}
    for name in ("collect", "dense_targets"):
        original = getattr(__import__("hf_prune.oneshot", fromlist=[name]), name)
        position = 2 if name == "collect" else 1

        def spy(*args, name=name, original=original, position=position):
            seen[name] = sum(len(batch["input_ids"]) for batch in args[position])
            return original(*args)

        monkeypatch.setattr(f"hf_prune.oneshot.{name}", spy)
    stage = {**STAGE, "sparsity": 0.5, "calibration_samples": 10, "reconstruction_samples": 14}
    batches = [inputs_for("bert", s) for s in range(8)]
    result = compress(tiny("bert"), {"stages": [stage]}, batches)
    assert seen == {"collect": 10, "dense_targets": 14}
    assert result.report["calibration_samples"] == 14


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("solver", ["knapsack", "global", "top_down"])
def test_whole_blocks_may_go(tiny, inputs_for, name, solver):
    """With floors of 0, as much goes as is asked for, and the result still runs."""
    model, batches = tiny(name), [inputs_for(name, s) for s in range(3)]
    stage = {**STAGE, "sparsity": 0.9, "solver": solver, "min_heads": 0, "min_neurons": 0}
    result = compress(model, {"stages": [stage]}, batches)
    (entry,) = result.report["pruning"]
    assert entry["met"]
    gone = count_parameters(model) - count_parameters(result.model)
    empty = {name for name, site in result.plan.sites.items() if not site.kept}
    assert empty, "at least one block is empty"
    # a layer that is left with nothing leaves its list, and takes its norms along
    assert gone > entry["removed"] if result.layers else gone == entry["removed"]
    left = {site.name for site in find_sites(result.model)}
    moved = {name for name in result.plan.sites if name not in empty}
    assert {rename_layers(name, result.layers) for name in left} == moved
    with torch.no_grad():
        output = result.model(**batches[0])
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("change", [{"reconstruction": "parallel"}, {"rescale": True}])
@pytest.mark.parametrize("name", ["bert", "albert"])
def test_other_fits_in_two_stages(tiny, inputs_for, name, change):
    """The second stage numbers units of the model that the first one left."""
    model, batches = tiny(name), [inputs_for(name, s) for s in range(4)]
    stages = [{**STAGE, **change, "sparsity": share} for share in (0.2, 0.4)]
    result = compress(model, {"stages": stages}, batches)
    plain = [{**stage, "reconstruct": False, "rescale": False} for stage in stages]
    other = compress(model, {"stages": plain}, batches)
    assert all(entry["refitted"] for entry in result.report["pruning"])
    assert not any(entry["refitted"] for entry in other.report["pruning"])


def test_rescaling_alone(tiny, inputs_for):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(6)]
    stage = {**STAGE, "sparsity": 0.5, "criterion": "magnitude", "reconstruct": False}
    plain = compress(model, {"stages": [stage]}, batches)
    scaled = compress(model, {"stages": [{**stage, "rescale": True}]}, batches)
    assert plain.plan == scaled.plan
    assert not same(plain.model, scaled.model)
    assert scaled.report["pruning"][0]["refitted"] > 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("criterion", ["kfac_obs_label", "kfac_obs_sampled"])
def test_other_gradients_in_a_recipe(tiny, inputs_for, name, criterion):
    """The budget is met all the same; only labels are needed more, where they are asked for."""
    batches = [inputs_for(name, s) for s in range(4)]
    recipe = {"stages": [{**STAGE, "sparsity": 0.5, "criterion": criterion}]}
    result = compress(tiny(name), recipe, batches)
    (entry,) = result.report["pruning"]
    assert entry["met"]
    assert result.plan == compress(tiny(name), recipe, batches).plan
    bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    if criterion == "kfac_obs_label":
        with pytest.raises(DataError, match="have no 'labels'"):
            compress(tiny(name), recipe, bare)
    else:
        assert compress(tiny(name), recipe, bare).plan == result.plan

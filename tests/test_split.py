"""Heads, neurons and single weights in one budget: asked equals got; the best split is taken."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune import compress, load_recipe, save_result
from hf_prune import split as room
from hf_prune.errors import ConfigError, DataError
from hf_prune.oneshot import analyse
from hf_prune.recipe import count_to_remove
from hf_prune.search.judge import Judge
from hf_prune.split import CLOSE, FIRST, SPLITS, Aim, _Budget, prune_jointly, try_splits
from hf_prune.weights.stage import find_stage

STAGE = {"stage": "prune", "units": ["heads", "neurons", "weights"], "sequence_length": 16}
TWO = pytest.mark.parametrize("name", ["bert", "llama"])


def left(model, stage):
    """Entries of the matrices of a stage that are not zero, and all of them."""
    matrices = [m.parameter for m in find_stage(model, stage.weights_part(0.0))]
    return sum(int((m != 0).sum()) for m in matrices), sum(m.numel() for m in matrices)


def run(tiny, inputs_for, name, **changes):
    batches = [inputs_for(name, s) for s in range(6)]
    recipe = load_recipe({"stages": [{**STAGE, "sparsity": 0.6, **changes}]})
    model = tiny(name)
    before = copy.deepcopy(model.state_dict())
    result = compress(model, recipe, batches)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return model, recipe.prune_stages[0], result


def test_every_stage_reads_as_many_examples_as_it_says(tiny, inputs_for, monkeypatch):
    """Units are decided on all of them, weights on fewer: the longer reading is not the rule."""
    seen, real = [], room.prune_stage_

    def watches(model, stage, batches, seed, **told):
        seen.append(sum(len(batch["input_ids"]) for batch in batches))
        return real(model, stage, batches, seed, **told)

    monkeypatch.setattr(room, "prune_stage_", watches)
    common = {"stage": "prune", "sparsity": 0.5, "min_calibration_samples": 1}
    units = {**common, "criterion": "magnitude", "calibration_samples": 12}
    weights = {**common, "units": ["weights"], "calibration_samples": 5}
    compress(tiny("bert"), {"stages": [units, weights]}, [inputs_for("bert", s) for s in range(4)])
    assert seen == [5]


LATER = [
    {},
    {"criterion": "sparsegpt"},
    {"criterion": "wanda", "reconstruct": False, "weights": {"dense_target": False}},
    {"criterion": "magnitude", "reconstruct": False, "weights": {"dense_target": False}},
    {"solver": "knapsack"},
    {"weights": {"pattern": "4x2"}},
]
"""Stages that choose in every way there is."""


@TWO
@pytest.mark.parametrize("later", LATER)
def test_zeros_of_an_earlier_stage_stay(tiny, inputs_for, name, later):
    """They count as removed: less never gives weights back, more goes on from them."""
    batches = [inputs_for(name, seed) for seed in range(3)]
    common = {"stage": "prune", "units": ["weights"], "min_calibration_samples": 4}
    whole = {"remove_dead": False}
    first = {**common, "weights": {"pattern": "2:4", **whole}}
    once = compress(tiny(name), {"stages": [first]}, batches)
    for sparsity in (0.3, 0.6):
        weights = {**later.get("weights", {}), **whole}
        second = {**common, **later, "sparsity": sparsity, "weights": weights}
        twice = compress(tiny(name), {"stages": [first, second]}, batches)
        zeros = total = 0
        for key, mask in twice.masks.items():
            weight = twice.model.get_parameter(key)
            assert not (mask & ~once.masks[key]).any(), key
            assert torch.equal(weight != 0, mask), key
            zeros, total = zeros + int((~mask).sum()), total + mask.numel()
        assert zeros / total >= max(sparsity, 0.5)
        if "solver" not in later:
            assert zeros / total < max(sparsity, 0.5) + 0.01


@TWO
@pytest.mark.parametrize("solver", ["uniform", "knapsack"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.85])
def test_asked_equals_got(tiny, inputs_for, name, solver, sparsity):
    weights = {"criterion": "wanda", "solver": solver}
    model, stage, result = run(
        tiny, inputs_for, name, sparsity=sparsity, weights=weights, search_trials=3
    )
    total = left(model, stage)[1]
    entry = result.report["pruning"][0]
    asked = entry["asked_to_remove"]
    assert (entry["kind"], entry["total"], entry["met"]) == ("joint", total, True)
    assert asked == count_to_remove(sparsity, total)
    gone = total - left(result.model, stage)[0]
    assert gone == entry["removed"]
    spare = 0.02 if entry["share_of_units"] < 1 else 0.1  # of a whole unit, or of rounding
    assert asked <= gone <= asked + spare * total


@TWO
def test_every_split_meets_the_budget_and_the_best_is_built(tiny, inputs_for, name):
    _, _, result = run(tiny, inputs_for, name, search_trials=5)
    entry, *parts = result.report["pruning"]
    splits = entry["splits"]
    assert [split["share"] for split in splits][:3] == list(FIRST)
    assert len({split["share"] for split in splits}) == len(splits) == 5
    for split in splits:
        assert split["with_units"] + split["zeroed"] >= entry["asked_to_remove"]
    units = {split["share"]: split["with_units"] for split in splits}
    assert units[0.0] == 0 < units[0.5] < units[1.0]
    (best,) = [split for split in splits if split["accepted"]]
    assert best["error"] == min(split["error"] for split in splits)
    assert entry["share_of_units"] == best["share"]
    kinds = [part["kind"] for part in parts]
    assert kinds == [k for k, n in (("structure", "with_units"), ("weights", "zeroed")) if best[n]]


def built(tiny, inputs_for, monkeypatch, name, share, **changes):
    """The result of a stage in which one split is found best."""
    monkeypatch.setattr("hf_prune.split.FIRST", (share,))
    return run(tiny, inputs_for, name, search_trials=1, **changes)


@TWO
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_split_is_a_stage_of_units_and_one_of_weights(tiny, inputs_for, monkeypatch, name, share):
    model, stage, result = built(tiny, inputs_for, monkeypatch, name, share)
    batches = [inputs_for(name, s) for s in range(6)]
    budget = _Budget(analyse(model, stage.structure_part(0.0), batches, 0), stage)
    stages, small = [], model
    if share:
        structure = budget.structure(share)
        stages.append(structure.model_dump(mode="json", exclude_none=True))
        small = compress(model, {"stages": stages}, batches).model
    weights = budget.weights(small).model_dump(mode="json", exclude_none=True)
    alone = compress(model, {"stages": [*stages, weights]}, batches)
    assert alone.plan == result.plan
    assert bool(alone.masks)
    assert all(torch.equal(mask, result.masks[n]) for n, mask in alone.masks.items())
    ours = dict(result.model.named_parameters())
    assert all(torch.equal(value, ours[n]) for n, value in alone.model.named_parameters())
    entries = [{k: v for k, v in e.items() if k != "seconds"} for e in alone.report["pruning"]]
    parts = [{k: v for k, v in e.items() if k != "seconds"} for e in result.report["pruning"]]
    assert parts[1:] == entries
    assert parts[-1]["criterion"] == "admm"
    for mask_name, mask in result.masks.items():
        assert not result.model.get_parameter(mask_name)[~mask].any()
    assert result.plan.weights == {n: int(m.sum()) for n, m in result.masks.items()}


@TWO
def test_it_is_saved_and_loads(tiny, inputs_for, monkeypatch, logits, tmp_path, name):
    _, stage, result = built(tiny, inputs_for, monkeypatch, name, 0.5)
    save_result(result, tmp_path / "out")
    loaded = type(result.model).from_pretrained(tmp_path / "out" / "model").eval()
    batch = inputs_for(name)
    assert torch.equal(logits(loaded, batch), logits(result.model, batch))
    assert left(loaded, stage) == left(result.model, stage)


def test_units_alone_where_they_are_enough(tiny, inputs_for, monkeypatch):
    """No mask is left, and no matrix has lost a single weight."""
    _, stage, result = built(tiny, inputs_for, monkeypatch, "llama", 1.0, sparsity=0.3)
    entry, structure = result.report["pruning"]
    assert entry["met"]
    assert structure["kind"] == "structure"
    assert not result.masks
    assert left(result.model, stage)[0] == left(result.model, stage)[1]


def test_what_biases_took_is_zeroed(tiny, inputs_for, monkeypatch):
    """Units of BERT have biases, which no matrix holds: a few weights make up for them."""
    _, _, result = built(tiny, inputs_for, monkeypatch, "bert", 1.0, sparsity=0.3)
    entry, structure, weights = result.report["pruning"]
    assert entry["met"]
    assert structure["met"]
    assert 0 < weights["removed"] < 0.05 * entry["asked_to_remove"]


def test_floors_leave_the_rest_to_weights(tiny, inputs_for, monkeypatch):
    changes = {"min_heads": 4, "min_neurons": 40, "sparsity": 0.7}
    _, _, result = built(tiny, inputs_for, monkeypatch, "bert", 1.0, **changes)
    entry, structure, weights = result.report["pruning"]
    assert not structure["met"]
    assert entry["met"]
    assert weights["removed"] > structure["removed"]


def test_the_judge_is_not_fitted(tiny, inputs_for, monkeypatch):
    """What is fitted while splits are tried and what judges have no example in common."""
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(6)]
    judge = Judge(model, batches)

    def rows(parts):
        return [
            tuple(row[real.bool()].tolist())
            for batch in parts
            for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]

    assert not set(rows(judge.fitted)) & set(rows(judge.examples))
    assert sorted(rows(judge.fitted) + rows(judge.examples)) == sorted(rows(batches))
    assert judge.error(model.train()) == 0
    assert model.training, "a model stays in the mode that it was in"
    used = []
    plain = __import__("hf_prune.split", fromlist=["prune_stage_"]).prune_stage_

    def watch(model, stage, batches, seed, **told):
        used.append(sorted(rows(batches)))
        return plain(model, stage, batches, seed, **told)

    refitted = []
    once = __import__("hf_prune.split", fromlist=["prune_once"]).prune_once

    def watch_units(analysis, stage):
        refitted.append(sorted(rows(analysis.dense_targets().batches)))
        return once(analysis, stage)

    monkeypatch.setattr("hf_prune.split.prune_stage_", watch)
    monkeypatch.setattr("hf_prune.split.prune_once", watch_units)
    stage = load_recipe({"stages": [{**STAGE, "sparsity": 0.5}]}).prune_stages[0]
    prune_jointly(model, stage, batches, 0, aim=Aim(model))
    assert len(used) >= SPLITS
    assert used[0] == sorted(rows(judge.fitted))
    assert used[-1] == sorted(rows(batches)), "in the end nothing is left out"
    assert refitted[0] == sorted(rows(judge.fitted))


@settings(max_examples=60, deadline=None)
@given(best=st.floats(0, 1), trials=st.integers(1, 14))
def test_splits_close_in_on_the_least_error(best, trials):
    """Of one valley; no share twice, all in [0, 1], and near it as trials grow."""
    tried = try_splits(lambda share: (share - best) ** 2, trials)
    shares = [share for share, _ in tried]
    assert len(set(shares)) == len(shares) <= trials
    assert all(0 <= share <= 1 for share in shares)
    assert shares[:3] == list(FIRST[:trials])
    if trials >= 3:
        gap = 0.5 ** (1 + (trials - 3) // 2)
        assert min(abs(share - best) for share in shares) <= max(gap, CLOSE)


def test_too_few_examples(tiny, inputs_for):
    recipe = {"stages": [{**STAGE, "sparsity": 0.5, "min_calibration_samples": 1}]}
    batch = {key: value[:1] for key, value in inputs_for("bert").items()}
    with pytest.raises(DataError, match="too few calibration examples to search with"):
        compress(tiny("bert"), recipe, [batch])
    with pytest.raises(DataError, match="calibration set is empty"):
        compress(tiny("bert"), recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"criterion": "wandda"}}, "did you mean 'wanda'"),
        ({"weights": {"solver": "globall"}}, "did you mean 'global'"),
        ({"criterion": "wanda"}, "unknown criterion 'wanda'"),
    ],
)
def test_names_are_checked_first(tiny, changes, message):
    recipe = {"stages": [{**STAGE, "sparsity": 0.5, **changes}]}
    with pytest.raises(ConfigError, match=message):
        compress(tiny("bert"), recipe)

"""Budgets remove exactly what is asked, and put it where their rule says."""

import pytest
import torch
from torch import nn

from hf_prune.errors import ConfigError, DataError
from hf_prune.recipe import Prune, count_to_remove
from hf_prune.weights.budgets import BUDGETS, OUTLIER_RANGE, allot
from hf_prune.weights.find import find_matrices, find_weights
from hf_prune.weights.gradients import gradient_scores
from hf_prune.weights.masks import magnitude_masks
from hf_prune.weights.patterns import Pattern, parse_pattern
from hf_prune.weights.problem import CRITERIA, Options, data_free_scores
from hf_prune.weights.sensitivity import measure_sensitivity
from hf_prune.weights.solvers import Problem, wanda
from hf_prune.weights.stage import check_weight_stage, needs_data, prune_stage_
from hf_prune.weights.walk import mask_of


def stage(**fields):
    return Prune(units=("weights",), **{"sparsity": 0.5, **fields})


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9])
def test_the_sum_is_exact(budget, sparsity, tiny, inputs_for):
    model = tiny("llama")
    matrices = find_matrices(model, ignore=["lm_head*"])
    told = Options(criterion="magnitude")
    removed = allot(model, matrices, budget, sparsity, told, [inputs_for("llama")])
    total = sum(matrix.numel for matrix in matrices)
    asked = count_to_remove(sparsity, total)
    got = sum(sum(counts) for counts in removed.values())
    assert asked <= got <= asked + (len(matrices) if budget == "uniform" else 0)
    for matrix in matrices:
        assert all(0 <= count < matrix.numel for count in removed[matrix.name])
    shares = {round(sum(removed[m.name]) / m.numel, 2) for m in matrices}
    assert (len(shares) == 1) == (budget == "uniform" or sparsity == 0)


def test_global_is_one_ranking_of_magnitudes(tiny):
    model = tiny("bert")
    matrices = find_matrices(model)
    removed = allot(model, matrices, "global", 0.6, Options(criterion="magnitude"))
    masks = magnitude_masks(find_weights(model), 0.6, "global")
    assert removed == {name: [int((~mask).sum())] for name, mask in masks.items()}


def test_a_common_threshold_in_standard_deviations():
    """`magnitude_sigma` with one ranking is one threshold `t * sigma` for all matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    model[1].weight.data *= 100
    matrices = find_matrices(model)
    removed = allot(model, matrices, "global", 0.5, Options(criterion="magnitude_sigma"))
    sizes = [m.parameter.detach() for m in matrices]
    ratios = [size.abs().flatten().sort().values / size.std() for size in sizes]
    limits = [float(r[removed[m.name][0] - 1]) for r, m in zip(ratios, matrices, strict=True)]
    above = [float(r[removed[m.name][0]]) for r, m in zip(ratios, matrices, strict=True)]
    assert max(limits) <= min(above), "one threshold fits both"


def test_outliers_stay_within_the_range(tiny, inputs_for):
    model = tiny("bert")
    matrices = find_matrices(model)
    removed = allot(model, matrices, "outliers", 0.6, Options(), [inputs_for("bert")])
    for matrix in matrices:
        assert abs(removed[matrix.name][0] / matrix.numel - 0.6) <= 2 * OUTLIER_RANGE + 0.02


def test_knapsack_loses_less_than_uniform(tiny, inputs_for):
    model, batches = tiny("bert"), [inputs_for("bert", seed) for seed in range(4)]
    matrices = find_matrices(model)
    known = measure_sensitivity(model, matrices, batches)

    def cost(removed):
        total = 0.0
        for matrix in matrices:
            gram = known[matrix.name].grams[0]
            gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
            problem = Problem(matrix.parameter.detach(), gram, Pattern(), removed[matrix.name][0])
            total += known[matrix.name].weight * float(problem.error(wanda(problem, 8)[0]).sum())
        return total

    losses = {
        budget: cost(allot(model, matrices, budget, 0.8, Options(), batches))
        for budget in ("uniform", "knapsack")
    }
    assert losses["knapsack"] < 0.98 * losses["uniform"]


def test_sensitivity_knows_inputs_and_gradients():
    """Of a linear network both are known by hand."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    inputs = torch.randn(50, 3)
    known = measure_sensitivity(model, find_matrices(model), [inputs[:20], inputs[20:]])
    torch.testing.assert_close(known["0.weight"].grams[0], inputs.T @ inputs / 50)
    hidden = (inputs @ model[0].weight.T).detach()
    torch.testing.assert_close(known["1.weight"].grams[0], hidden.T @ hidden / 50)
    assert known["1.weight"].weight == pytest.approx(1.0), "d(+-z)/dz is a sign"
    expected = float(model[1].weight.detach().square().mean())
    assert known["0.weight"].weight == pytest.approx(expected, rel=1e-5)


def test_gradient_scores(tiny, inputs_for):
    """To first order, `sensitivity` is what the loss changes by when one weight is zeroed."""
    model, batch = tiny("bert"), inputs_for("bert")
    matrices = find_matrices(model, targets=["*layer.1.output.dense"])
    scores = gradient_scores(model, matrices, [batch], "sensitivity")[matrices[0].name][0]
    weight = matrices[0].parameter
    with torch.no_grad():
        for index in [(0, 0), (3, 7), (31, 47)]:
            value, step = float(weight[index]), 0.05
            losses = []
            for sign in (1, -1):
                weight[index] = value * (1 + sign * step)
                losses.append(float(model(**batch).loss.double()))
            weight[index] = value
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert float(scores[index]) == pytest.approx(slope, abs=5e-6, rel=0.05)
    fisher = gradient_scores(model, matrices, [batch], "fisher_diagonal")[matrices[0].name]
    assert (fisher >= 0).all()
    assert fisher.std() > 0


def test_gradient_scores_ask_for_labels(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    del batch["labels"]
    model.train()
    with pytest.raises(DataError, match="needs labels in every batch"):
        gradient_scores(model, find_matrices(model), [batch], "sensitivity")
    assert model.training, "what is refused leaves the model as it was"


def test_which_tokens_count(tiny, inputs_for):
    """Of an encoder with a decoder all do: the mask of the one says nothing of the other's."""
    batch = inputs_for("bert")
    assert torch.equal(mask_of(tiny("bert"), batch), batch["attention_mask"].bool())
    assert mask_of(tiny("t5"), inputs_for("t5")) is None
    assert mask_of(nn.Linear(3, 3), torch.randn(4, 3)) is None


def test_scores_without_inputs(tiny):
    """Collected ones come first; a criterion that needs inputs gives way to the magnitude."""
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    known = {"w": torch.arange(12.0).view(2, 2, 3)}
    assert torch.equal(Options("wanda", scores=known).scores_of("w", 1, weight), known["w"][1])
    assert torch.equal(Options("wanda").scores_of("w", 1, weight), weight.abs())
    random = Options("random", seed=3).scores_of("w", 1, weight)
    assert torch.equal(random, data_free_scores("random", "w", 1, weight, 3))


def test_data_free_scores():
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert data_free_scores("magnitude", "w", 0, weight, 0).tolist() == [[1, 2], [3, 4]]
    expected = [[1 / 3 + 1 / 4, 2 / 3 + 2 / 6], [3 / 7 + 3 / 4, 4 / 7 + 4 / 6]]
    found = data_free_scores("magnitude_normalized", "w", 0, weight, 0)
    torch.testing.assert_close(found, torch.tensor(expected))
    one, same, other = (data_free_scores("random", n, 0, weight, 0) for n in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "2x2"])
def test_every_criterion_takes_every_pattern(criterion, pattern, tiny, inputs_for):
    model = tiny("bert")
    fields = {"sparsity": None} if ":" in pattern else {}
    told = stage(criterion=criterion, weights={"pattern": pattern}, **fields)
    result, entry = prune_stage_(model, told, [inputs_for("bert")], 0)
    assert entry["sparsity"] == pytest.approx(0.75 if ":" in pattern else 0.5, abs=0.02)
    assert entry["removed"] == sum(int((~mask).sum()) for mask in result.masks.values())
    assert entry["pattern"] == pattern
    for name, mask in result.masks.items():
        assert not model.get_parameter(name)[~mask].any(), name


def test_ranks_by_row_where_models_generate(tiny, inputs_for):
    for name, expected in (("bert", "matrix"), ("llama", "row")):
        told = stage(criterion="magnitude", reconstruct=False, weights={"dense_target": False})
        assert prune_stage_(tiny(name), told, [], 0)[1]["ranked_by"] == expected
        told = stage(criterion="magnitude", weights={"rank": "matrix"})
        entry = prune_stage_(tiny(name), told, [inputs_for(name)], 0)[1]
        assert entry["ranked_by"] == "matrix"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "admn"}, "unknown criterion 'admn' for weights; did you mean 'admm'"),
        ({"solver": "globel"}, "unknown solver 'globel' for weights; did you mean 'global'"),
        ({"solver": "global"}, "criterion 'admm' compares weights within a matrix only"),
        (
            {"weights": {"pattern": "2:4"}, "solver": "knapsack"},
            "pattern 2:4 removes the same share of every matrix",
        ),
        ({"weights": {"pattern": "5:4"}}, "keeps 5 of 4"),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_weight_stage(stage(**fields))


def test_defaults_and_needs():
    told = stage()
    assert (told.criterion, told.solver, told.single.dense_target) == ("admm", "uniform", True)
    assert Prune(sparsity=0.5).criterion != "admm"
    assert needs_data(told)
    plain = {"criterion": "magnitude", "reconstruct": False, "weights": {"dense_target": False}}
    assert not needs_data(stage(**plain))
    assert needs_data(stage(**plain, solver="outliers"))
    assert parse_pattern(told.single.pattern) == Pattern()


def test_a_pattern_says_its_sparsity():
    told = stage(sparsity=None, weights={"pattern": "2:8"})
    assert told.fraction == 0.75
    with pytest.raises(ValueError, match=r"pattern 2:8 removes 0\.75 of the weights"):
        stage(sparsity=0.5, weights={"pattern": "2:8"})
    with pytest.raises(ValueError, match="weights: is for a stage of single weights"):
        Prune(sparsity=0.5, weights={"pattern": "2:4"})


def test_nothing_left():
    with pytest.raises(ConfigError, match="no weight is left to prune"):
        prune_stage_(nn.Linear(3, 3), stage(ignore=("*",)), [torch.randn(4, 3)], 0)

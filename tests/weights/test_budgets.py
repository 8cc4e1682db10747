"""Budgets remove exactly what is asked, and put it where their rule says."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import BertForMultipleChoice, BertForPreTraining

from hf_prune import sparsify_
from hf_prune.errors import ConfigError, DataError, UnsupportedModelError
from hf_prune.recipe import Prune, count_to_remove
from hf_prune.statistics.collect import SEED_STEP
from hf_prune.statistics.ridge import ridge_of
from hf_prune.weights.budgets import BUDGETS, OUTLIER_RANGE, allot
from hf_prune.weights.find import find_matrices, find_weights
from hf_prune.weights.gradients import gradient_scores
from hf_prune.weights.inputs import real_rows
from hf_prune.weights.masks import magnitude_masks
from hf_prune.weights.patterns import Pattern, parse_pattern
from hf_prune.weights.problem import CRITERIA, Options, data_free_scores
from hf_prune.weights.sensitivity import measure_sensitivity
from hf_prune.weights.solvers import Problem, wanda
from hf_prune.weights.stage import check_weight_stage, needs_data, options_of, prune_stage_
from hf_prune.weights.walk import real_tokens

PLAIN = {"weights": {"dense_target": False}}


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
            total += known[matrix.name].weights[0] * float(
                problem.error(wanda(problem, 8)[0]).sum()
            )
        return total

    losses = {
        budget: cost(allot(model, matrices, budget, 0.8, Options(), batches))
        for budget in ("uniform", "knapsack")
    }
    assert losses["knapsack"] < 0.98 * losses["uniform"]


WAYS = {
    "admm": {},
    "sparsegpt": {"criterion": "sparsegpt"},
    "wanda by norms": {"criterion": "wanda", "reconstruct": False, **PLAIN},
    "magnitude": {"criterion": "magnitude", "reconstruct": False, **PLAIN},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", ["outliers", "knapsack"])
def test_matrices_differ_in_how_many_of_m_stay(solver, way, tiny, inputs_for):
    """The n of each matrix is a whole one, and no more stays in all than n of m everywhere."""
    model, fields = tiny("llama"), WAYS[way]
    weights = {**fields.get("weights", {}), "pattern": "4:8"}
    told = Prune(units=("weights",), solver=solver, **{**fields, "weights": weights})
    result, entry = prune_stage_(model, told, [inputs_for("llama")], 0)
    masks, found = result.masks, set()
    for name, mask in masks.items():
        rows, columns = mask.shape
        each = mask.view(rows, columns // 8, 8).sum(dim=-1)
        assert int(each.min()) == int(each.max()) > 0, name
        assert not model.get_parameter(name)[~mask].any()
        assert entry["kept_of_m"][name] == int(each.max())
        found.add(int(each.max()))
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert len(found) > 1
    assert total * 0.45 < kept <= total // 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_what_attention_makes_inside_is_felt_as_it_is():
    """Queries, keys and values count by what they change, and not as if they were the output."""
    torch.manual_seed(0)
    model = Attention().eval()
    inputs = torch.randn(16, 12, 6) @ torch.randn(6, 32)
    with torch.no_grad():
        wanted = model(inputs)
    lost = {}
    for solver in ("uniform", "knapsack"):
        pruned = copy.deepcopy(model)
        sparsify_(pruned, [inputs], sparsity=0.5, solver=solver)
        with torch.no_grad():
            lost[solver] = float((pruned(inputs) - wanted).square().mean())
    assert lost["knapsack"] < 0.3 * lost["uniform"]


def test_the_knapsack_of_n_of_m_is_the_best(tiny, inputs_for):
    """Of all choices of n for three matrices, none with as few entries has a smaller error."""
    model, batches = tiny("llama"), [inputs_for("llama")]
    matrices = find_matrices(model, targets=["*layers.0.mlp*"])
    matrices[0].parameter.data[:, torch.arange(matrices[0].parameter.shape[1]) % 4 > 0] /= 100
    told = Options(pattern=parse_pattern("2:4"))
    known = measure_sensitivity(model, matrices, batches, 0)
    removed = allot(model, matrices, "knapsack", 0.0, told, batches)

    def error(matrix, n):
        level, count = parse_pattern(f"{n}:4") if n < 4 else Pattern("n:m", 4, 4), 0
        of = known[matrix.name]
        damping = told.ridge * of.grams[0].diagonal().mean()
        gram = of.grams[0] + damping * torch.eye(of.grams[0].shape[0])
        problem = Problem(matrix.parameter.data, gram, level, count)
        return of.weights[0] * float(problem.error(wanda(problem, 8)[0]).sum())

    sizes = [matrix.numel for matrix in matrices]
    errors = [[error(matrix, n) for n in range(1, 5)] for matrix in matrices]
    choices = [
        (sum(e[n - 1] for e, n in zip(errors, ns, strict=True)), ns)
        for ns in itertools.product(range(1, 5), repeat=3)
        if sum(n * size for n, size in zip(ns, sizes, strict=True)) <= 2 * sum(sizes)
    ]
    chosen = [4 - 4 * removed[m.name][0] // m.numel for m in matrices]
    best, ns = min(choices)
    assert tuple(chosen) == ns
    assert best < sum(e[1] for e in errors)


def test_sensitivity_knows_inputs_and_gradients():
    """Of a linear network both are known by hand."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    inputs = torch.randn(50, 3)
    known = measure_sensitivity(model, find_matrices(model), [inputs[:20], inputs[20:]])
    torch.testing.assert_close(known["0.weight"].grams[0], inputs.T @ inputs / 50)
    hidden = (inputs @ model[0].weight.T).detach()
    torch.testing.assert_close(known["1.weight"].grams[0], hidden.T @ hidden / 50)
    assert known["1.weight"].weights == pytest.approx([50.0]), "d(+-z)/dz is a sign, 50 times"
    expected = 50 * float(model[1].weight.detach().square().mean())
    assert known["0.weight"].weights == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_position_and_every_call_is_felt(frozen):
    """A convolution is felt at all positions, a layer that runs twice at both of its calls."""
    head = nn.Linear(12, 1, bias=False)
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), head)
    model.requires_grad_(not frozen)
    known = measure_sensitivity(model, find_matrices(model), [torch.randn(5, 1, 6)])
    expected = 5 * float(head.weight.detach().square().sum()) / 2  # of each of two channels
    assert known["0.weight"].weights == pytest.approx([expected], rel=1e-5)
    assert all(p.requires_grad is not frozen for p in model.parameters())
    twice = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(twice, twice, nn.Linear(3, 1, bias=False))
    known = measure_sensitivity(model, find_matrices(model), [torch.randn(4, 3)])
    last = model[2].weight.detach()
    both = last.square().mean() + (last @ twice.weight.detach()).square().mean()
    assert known["0.weight"].weights == pytest.approx([4 * float(both)], rel=1e-4)


class Last(nn.Module):
    """What a recurrent layer ends with, read as a state or as its last output."""

    def __init__(self, state, kind=nn.GRU):
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.out = kind(4, 6, batch_first=True), nn.Linear(6, 3)
        self.state = state

    def forward(self, x):
        outputs, states = self.rnn(x)
        return self.out(states[-1] if self.state else outputs[:, -1])


def test_states_that_a_recurrent_layer_ends_with_are_felt():
    batch = torch.randn(5, 7, 4)
    known = []
    for state in (True, False):
        model = Last(state)
        known.append(measure_sensitivity(model, find_matrices(model), [batch]))
    for name, one in known[0].items():
        assert one.weights == pytest.approx(known[1][name].weights, rel=1e-5), name
        assert one.weights[0] > 0


class Twice(nn.Module):
    """Two modules of one matrix, the first or the second of which hardly counts."""

    def __init__(self, factors):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.factors = factors

    def forward(self, x):
        return self.one(x[:, :8]) * self.factors[0] + self.two(x[:, 8:]) * self.factors[1]


def test_a_matrix_is_felt_through_all_modules_that_have_it():
    inputs = torch.randn(40, 16)
    grams = [part.T @ part for part in inputs.split(8, dim=1)]
    for factors in ((1e-3, 1.0), (1.0, 1e-3)):
        model = Twice(factors)
        (known,) = measure_sensitivity(model, find_matrices(model), [inputs]).values()
        assert known.weights == pytest.approx([40 * (1 + 1e-6)], rel=1e-4)
        torch.testing.assert_close(known.grams[0], (grams[0] + grams[1]) / 80)


class Picky(nn.Module):
    """Calls its second layer from the second batch on, and gives a list."""

    def __init__(self, gives=list):
        super().__init__()
        self.one, self.two, self.gives = nn.Linear(4, 4), nn.Linear(4, 4), gives

    def forward(self, x):
        hidden = self.one(x).tanh()
        return self.gives([self.two(hidden) if len(x) > 8 else hidden])


@pytest.mark.parametrize("solver", ["knapsack", "outliers"])
def test_budgets_follow_what_not_every_batch_runs(solver):
    model = Picky()
    result = sparsify_(model, [torch.randn(8, 4), torch.randn(9, 4)], sparsity=0.5, solver=solver)
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == 16
    with pytest.raises(UnsupportedModelError, match="never ran two"):
        sparsify_(Picky(), [torch.randn(8, 4)], sparsity=0.5, solver=solver)


class Packed(Last):
    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        return super().forward(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))


@pytest.mark.parametrize("solver", ["uniform", "knapsack", "outliers"])
def test_packed_sequences_are_pruned_as_padded_ones_of_one_length(solver):
    batch, found = torch.randn(9, 5, 4), []
    for make in (Last, Packed):
        model = make(True)
        sparsify_(model, [batch], sparsity=0.5, solver=solver)
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)


def test_what_a_budget_cannot_follow_is_said():
    with pytest.raises(UnsupportedModelError, match="gives a set, of which no gradient"):
        sparsify_(Picky(set), [torch.randn(9, 4)], sparsity=0.5, solver="knapsack")


def test_gradients_of_what_never_ran_say_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].extra = nn.Linear(4, 4)
    before = model[0].extra.weight.clone()
    told = {"criterion": "fisher_diagonal", "solver": "global", "reconstruct": False}
    with pytest.raises(UnsupportedModelError, match=r"calibration never ran 0\.extra"):
        sparsify_(model, [torch.randn(8, 4)], sparsity=0.5, weights={"dense_target": False}, **told)
    assert torch.equal(model[0].extra.weight, before)


def test_experts_are_felt_by_the_tokens_that_they_get(tiny, inputs_for):
    model, batch = tiny("mixtral"), inputs_for("mixtral")
    matrices = find_matrices(model, targets=["*experts*"])
    known = measure_sensitivity(model, matrices, [batch])
    chosen = model.config.num_experts_per_tok
    for matrix in matrices:
        found = known[matrix.name].weights
        assert len(found) == matrix.groups
        assert len(set(found)) > 1, "not all get the same"
    first = known[matrices[0].name].weights
    total = sum(known[matrices[1].name].weights)
    assert sum(first) == pytest.approx(total, rel=1e-5), "every token has as many experts"
    assert max(first) < total / chosen + 1e-6, "no expert gets a token twice"


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


def test_gradient_scores_are_means_over_projections(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    matrices = find_matrices(model)[:2]
    both, first, second = (
        gradient_scores(model, matrices, [batch], "fisher_diagonal", seed, projections)
        for seed, projections in ((3, 2), (3, 1), (3 + SEED_STEP, 1))
    )
    for name in both:
        torch.testing.assert_close(both[name], (first[name] + second[name]) / 2)
        assert not torch.equal(first[name], second[name])
    told = stage(criterion="fisher_diagonal", projections=8, reconstruct=False)
    many, _ = prune_stage_(tiny("bert"), told, [batch], 0)
    one, _ = prune_stage_(tiny("bert"), told.model_copy(update={"projections": 1}), [batch], 0)
    assert any(not torch.equal(many.masks[name], mask) for name, mask in one.masks.items())


def test_gradient_scores_ask_for_labels(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    del batch["labels"]
    model.train()
    with pytest.raises(DataError, match="needs labels in every batch"):
        gradient_scores(model, find_matrices(model), [batch], "sensitivity")
    assert model.training, "what is refused leaves the model as it was"


def test_gradient_scores_need_all_labels_of_a_loss(tiny, inputs_for):
    model, batch = BertForPreTraining(tiny("bert").config), inputs_for("bert")
    batch["labels"] = batch["input_ids"]
    with pytest.raises(DataError, match="BertForPreTraining gave no loss: pass all the labels"):
        gradient_scores(model, find_matrices(model), [batch], "sensitivity")


def test_which_tokens_count(tiny, inputs_for):
    batch = inputs_for("bert")
    (real,) = real_tokens(tiny("bert"), [batch])
    assert torch.equal(real.of("bert.pooler.dense"), batch["attention_mask"].bool())
    assert real_tokens(nn.Linear(3, 3), [torch.randn(4, 3)])[0].of("") is None


def test_which_tokens_of_several_choices_count(tiny):
    model = BertForMultipleChoice(tiny("bert").config)
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]])
    batch = {"input_ids": torch.full((2, 2, 3), 7), "attention_mask": mask}
    (real,) = real_tokens(model, [batch])
    seen = torch.arange(12.0).view(4, 3, 1)  # [B * choices, T, E]
    for told in (real.of(""), real.of("").view(2, 6)):
        assert torch.equal(real_rows(seen, told), seen[mask.view(4, 3).bool()])


@pytest.mark.parametrize(
    ("name", "crosses"),
    [("t5", ["EncDecAttention.k", "EncDecAttention.v"]), ("bart", ["encoder_attn.k_proj"])],
)
def test_which_tokens_of_encoder_and_decoder_count(name, crosses, tiny, inputs_for):
    """Keys and values of cross-attention read the sequence of the encoder, all else its own."""
    model, batch = tiny(name), inputs_for(name)
    batch["labels"][0, 3:] = -100
    (real,) = real_tokens(model, [batch])
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    ours = [n for n in linear if ".decoder." not in f".{n}" and "encoder" in n]
    cross = [n for n in linear if n.endswith(tuple(crosses))]
    assert ours
    assert cross
    for module in (*ours, *cross):
        assert torch.equal(real.of(module), batch["attention_mask"].bool()), module
    for module in linear:
        if module.endswith(("q_proj", "SelfAttention.q", "lm_head")) and module not in ours:
            assert torch.equal(real.of(module), batch["labels"] != -100), module


def test_global_is_one_ranking_of_models_that_generate(tiny):
    model = tiny("llama")
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    told = stage(criterion="magnitude", solver="global", reconstruct=False, **PLAIN)
    result, entry = prune_stage_(model, told, [], 0)
    gone = torch.cat([dense[n][~mask].abs() for n, mask in result.masks.items()])
    kept = torch.cat([dense[n][mask].abs() for n, mask in result.masks.items()])
    assert gone.max() <= kept.min()
    assert entry["ranked_by"] == "matrix"
    with pytest.raises(ConfigError, match="one ranking of all matrices: leave rank: row out"):
        check_weight_stage(stage(criterion="magnitude", solver="global", weights={"rank": "row"}))


def test_global_ranks_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data *= 3
    dense = [m.weight.detach().clone() for m in model]
    weights = {"dense_target": False, "pattern": "2x2"}
    told = stage(criterion="magnitude", solver="global", reconstruct=False, weights=weights)
    prune_stage_(model, told, [], 0)
    grids = [m.view(4, 2, 4, 2).square().sum(dim=(1, 3)).flatten() for m in dense]
    left = [(m.weight.view(4, 2, 4, 2) != 0).any(dim=3).any(dim=1).flatten() for m in model]
    scores, kept = torch.cat(grids), torch.cat(left)
    assert int(kept.sum()) == 16
    assert scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_a_block_of_every_matrix_stays(budget, caplog):
    """A layer of zeros ends a network; one no larger than a block stays as it is, and is named."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 24), nn.Linear(24, 24))
    weights = {"dense_target": False, "pattern": "16x16"}
    told = stage(
        sparsity=0.9, criterion="magnitude", solver=budget, reconstruct=False, weights=weights
    )
    prune_stage_(model, told, [], 0)
    assert all(bool((m.weight != 0).any()) for m in model)
    assert bool((model[0].weight != 0).all())
    assert "no larger than one block of 16x16, and left as they are: 0.weight" in caplog.text


def test_a_weight_of_every_matrix_stays(caplog):
    """Of a matrix that ranks last as a whole one weight stays, and it is named."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight.data *= 0.001
    largest = model[2].weight.detach().abs().argmax()
    told = stage(criterion="magnitude", solver="global", reconstruct=False, **PLAIN)
    prune_stage_(model, told, [], 0)
    assert model[2].weight.flatten().nonzero().flatten().tolist() == [int(largest)]
    assert "the budget would leave nothing of 2.weight: one weight of each stays" in caplog.text


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


def test_the_ridge_is_that_of_what_the_model_does(tiny):
    told = [
        ("bert", {}, 0.01),
        ("llama", {}, 0.1),
        ("llama", {"weights": {"dense_target": False}}, 0.01),
        ("llama", {"ridge": 0.03}, 0.03),
        ("bert", {"ridge": 0.03}, 0.03),
    ]
    for name, fields, ridge in told:
        assert options_of(tiny(name), stage(**fields), 0, {}).ridge == ridge, (name, fields)
    assert options_of(nn.Linear(2, 2), stage(), 0, {}).ridge == 0.01
    units = [
        ("bert", {}, 0.01),
        ("llama", {}, 0.1),
        ("llama", {"reconstruction": "parallel"}, 0.01),
        ("llama", {"units": ("hidden",)}, 0.01),
        ("llama", {"ridge": 0.03}, 0.03),
    ]
    for name, fields, ridge in units:
        assert ridge_of(tiny(name), Prune(sparsity=0.5, **fields)) == ridge, (name, fields)


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
            {"weights": {"pattern": "2:4"}, "solver": "global", "criterion": "magnitude"},
            "pattern 2:4 ranks neighbours, and solver 'global' all weights",
        ),
        (
            {"weights": {"pattern": "2:4"}, "sparsity": None, "solver": "outliers"},
            r"moves sparsities by 0\.08 at most, .* half a step of 2:4",
        ),
        (
            {"weights": {"pattern": "1:4"}, "sparsity": None, "solver": "knapsack"},
            "1:4: no matrix can keep less, .* or 2:8",
        ),
        ({"projections": 2}, "projections=2: criterion 'admm' draws none"),
        ({"projections": 2, "criterion": "sensitivity"}, "criterion 'sensitivity' draws none"),
        (
            {
                "ridge": 0.5,
                "criterion": "magnitude",
                "reconstruct": False,
                "weights": {"dense_target": False},
            },
            "ridge=0.5: nothing is fitted",
        ),
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


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude_sigma"])
@pytest.mark.parametrize("reconstruct", [True, False])
def test_a_threshold_in_standard_deviations(criterion, reconstruct, tiny, inputs_for):
    """By each matrix alone, packed experts too; not by rows, though the model generates."""
    model = tiny("mixtral")
    before = {m.name: m.view(m.parameter.detach().clone()) for m in find_matrices(model)}
    told = {"criterion": criterion, "sparsity": None, "reconstruct": reconstruct}
    single = {"threshold_std": 0.5, "dense_target": False}
    result, entry = prune_stage_(model, stage(**told, weights=single), [inputs_for("mixtral")], 0)
    for matrix in find_matrices(model):
        old, mask = before[matrix.name], matrix.view(result.masks[matrix.name])
        for weight, kept in zip(old, mask, strict=True):
            assert torch.equal(kept, weight.abs() >= 0.5 * weight.std()), matrix.name
    removed = sum(int((~mask).sum()) for mask in result.masks.values())
    assert entry["removed"] == removed
    assert entry["sparsity"] == pytest.approx(removed / entry["total"])
    assert 0.2 < entry["sparsity"] < 0.6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.5}, "give either sparsity or target, or of weights threshold_std"),
        ({"schedule": {}}, "in one shot: give a sparsity"),
        ({"units": ("heads", "weights"), "criterion": "taylor"}, "in one shot: give a sparsity"),
        ({"weights": {"threshold_std": 1.0, "pattern": "2:4"}}, "leave pattern, rank out"),
        ({"weights": {"threshold_std": 1.0, "rank": "row"}}, "leave pattern, rank out"),
        ({"solver": "global"}, "leaves the solver nothing to decide"),
        ({"criterion": "admm"}, "criterion 'admm' ranks by something else"),
        ({"weights": {"threshold_std": 9.0}}, r"no weight of weight is that large.* largest has"),
    ],
)
def test_a_threshold_that_cannot_be_followed(fields, message):
    plain = {"criterion": "magnitude", "sparsity": None, "weights": {"threshold_std": 1.0}}
    told = {"units": ("weights",), **plain, **fields}
    with pytest.raises(ValueError, match=message):
        prune_stage_(nn.Linear(3, 3), Prune(**told), [torch.randn(4, 3)], 0)


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

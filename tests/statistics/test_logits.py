"""What logits are of decides what no model can tell apart, and how far two models are."""

import copy

import pytest
import torch
import transformers as hf
from tinies import TINY
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from hf_prune import analyse_sensitivity, compress
from hf_prune.search.judge import Judge
from hf_prune.sites import find_sites
from hf_prune.statistics.collect import collect
from hf_prune.statistics.logits import Said, centred, divergence, kind_of, said
from hf_prune.statistics.projection import project_logits
from hf_prune.training.polish import polish_, with_judges
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks

TASKS = {
    "reward": ("regression", 1, hf.BertForSequenceClassification),
    "numbers": ("regression", 3, hf.BertForSequenceClassification),
    "flags": ("multi_label_classification", 3, hf.BertForSequenceClassification),
    "classes": (None, 3, hf.BertForSequenceClassification),
    "positions": (None, 2, hf.BertForQuestionAnswering),
}


@pytest.fixture
def task(tiny):
    """`task(name)`: a tiny BERT with the head of a task, in eval mode."""

    def make(name):
        problem, labels, auto = TASKS[name]
        config = TINY["bert"]()
        config.num_labels, config.problem_type = labels, problem
        torch.manual_seed(0)
        model = auto(config).eval()
        model.bert.load_state_dict(tiny("bert").bert.state_dict(), strict=False)
        return model

    return make


@pytest.fixture
def batches(inputs_for):
    """`batches(count)`: batches of 32 texts without labels."""

    def make(count=2):
        found = [inputs_for("bert", seed, (9, 6, 4, 7) * 8) for seed in range(count)]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in found]

    return make


def test_what_logits_are_of(task, tiny, inputs_for, batches):
    batch = batches(1)[0]
    with torch.no_grad():
        found = {name: kind_of(task(name), task(name)(**batch)) for name in TASKS}
        assert found == {**{name: name for name in TASKS}, "reward": "numbers"}
        bare = tiny("bert").bert
        assert kind_of(bare, bare(**batch)) == "numbers", "hidden states are no classes"
        for name in ("llama", "t5"):
            model = tiny(name)
            model.config.problem_type = "regression"  # which language models do not read
            assert kind_of(model, model(**inputs_for(name))) == "classes"


def test_what_is_taken_off():
    values, real = torch.randn(2, 4), torch.tensor([[True] * 4, [True, True, False, True]])
    for kind in ("flags", "numbers"):
        assert torch.equal(centred(values, kind), values)
    torch.testing.assert_close(centred(values, "classes").sum(dim=-1), torch.zeros(2))
    found = centred(values, "positions", real)
    kept = values[1, [0, 1, 3]]
    torch.testing.assert_close(found[1, [0, 1, 3]], kept - kept.mean())
    assert found[1, 2] == 0


def test_divergence_against_distributions():
    one, two = torch.randn(2, 5, 3)

    def between(kind):
        return divergence(Said(one, kind), Said(two, kind))

    pairs = {
        "classes": kl_divergence(Categorical(logits=one), Categorical(logits=two)),
        "flags": kl_divergence(Bernoulli(logits=one), Bernoulli(logits=two)).sum(dim=-1),
        "numbers": kl_divergence(Normal(one, 1.0), Normal(two, 1.0)).sum(dim=-1),
    }
    for kind, expected in pairs.items():
        torch.testing.assert_close(between(kind), expected, atol=1e-6, rtol=1e-5, msg=kind)


def test_answers_are_compared_over_the_real_tokens_of_their_text(task, batches):
    model, batch = task("positions"), batches(1)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.qa_outputs.weight += torch.randn(2, 32)
        outputs = model(**batch), other(**batch)
        ours, theirs = (said(m, batch, o) for m, o in zip((model, other), outputs, strict=True))
    found, place = divergence(ours, theirs), 0
    for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
        for name in ("start_logits", "end_logits"):
            one, two = (Categorical(logits=output[name][row, :length]) for output in outputs)
            torch.testing.assert_close(found[place], kl_divergence(one, two), atol=1e-6, rtol=1e-4)
            place += 1
    assert place == len(found)
    assert ours.entries == 2 * batch["attention_mask"].sum()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_judge_sees_what_a_model_can_tell_and_no_more(task, batches, name):
    """Adding one number to all logits changes flags and numbers, and no softmax."""
    model = task(name)
    judge, moved, same = Judge(model, batches()), copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        head = moved.qa_outputs if name == "positions" else moved.classifier
        head.bias += 5.0
    blind = name in ("classes", "positions")
    assert judge.error(moved) == pytest.approx(0.0 if blind else 25.0, abs=1e-4)
    assert judge.error(same) == 0.0


def test_a_judge_of_answers_sees_both_ends_move_alike(task, batches):
    model = task("positions")
    judge, other = Judge(model, batches()), copy.deepcopy(model)
    with torch.no_grad():
        other.qa_outputs.weight += torch.randn(1, 32)  # the same to start and end
    assert judge.error(other) > 0.01


def test_directions_are_blind_to_what_changes_nothing():
    logits = torch.randn(1, 6, 2, requires_grad=True)
    for kind, axis in (("classes", -1), ("positions", 1)):
        (v,) = torch.autograd.grad(project_logits(logits, [0], said=kind).sum(), logits)
        torch.testing.assert_close(v.sum(dim=axis), torch.zeros_like(v.sum(dim=axis)))
    assert v.abs().sum(dim=-1).min() > 0, "each token has a direction"
    for kind in ("flags", "numbers"):
        (v,) = torch.autograd.grad(project_logits(logits, [0], said=kind).sum(), logits)
        assert (v.abs() == 1).all()


@pytest.mark.parametrize("name", ["numbers", "flags"])
def test_what_moves_all_flags_or_numbers_alike_is_curvature(task, batches, name):
    model = task(name)
    model.classifier.weight.data[:] = model.classifier.weight.data[:1].clone()
    found = collect(model, find_sites(model), batches(1), ["projected_fisher"])
    assert all(each["projected_fisher"].sum() > 1e-6 for each in found.values())


@pytest.mark.parametrize("name", ["reward", "flags", "positions"])
def test_searches_splits_and_curves_see_errors(task, batches, name):
    stage = {"stage": "prune", "sparsity": 0.5, "min_calibration_samples": 1, "round_to": 8}
    model, data = task(name), batches()
    entry = compress(model, {"stages": [{**stage, "search_trials": 3}]}, data).report["pruning"][0]
    assert all(trial["error"] > 0 for trial in entry["search"])
    curves = analyse_sensitivity(model, data[:1], ("fisher",)).curves
    for curve in curves.values():
        assert min(curve["kl"][1:] + curve["logit_error"][1:]) > 0


@pytest.mark.parametrize("name", ["reward", "numbers", "flags", "positions"])
def test_a_polish_comes_nearer(task, batches, name):
    dense = task(name)
    model = copy.deepcopy(dense)
    apply_masks_(model, magnitude_masks(find_weights(model), 0.6))
    found = polish_(model, dense, *with_judges(dense, batches(6)), steps=36, learning_rate=2e-3)
    assert found["kept"]
    assert 0 < found["after"] < found["before"]

"""Students made of parts of their teacher, or at random."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_prune import make_student, remove_units
from hf_prune.errors import ConfigError, DataError
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Student
from hf_prune.sites import HIDDEN, find_sites, layer_modules
from hf_prune.training.student import choose

NAMES = ["bert", "roberta", "electra", "distilbert", "gpt2", "llama"]


@pytest.mark.parametrize("name", NAMES)
def test_a_student_of_the_same_size_is_its_teacher(tiny, inputs_for, logits, name):
    teacher, batch = tiny(name), inputs_for(name)
    student = make_student(teacher, Student(), [batch])
    assert torch.equal(logits(student, batch), logits(teacher, batch))
    assert student is not teacher


@pytest.mark.parametrize("name", NAMES)
def test_fewer_neurons_are_those_that_pruning_would_keep(tiny, inputs_for, logits, name):
    teacher, batch = tiny(name), inputs_for(name)
    stage = Student(neurons=20)
    units = choose(teacher, stage, [batch]).units
    pruned = copy.deepcopy(teacher)
    sites = [site for site in find_sites(teacher) if site.kind == "neurons"]
    kept = {s.name: SitePlan("neurons", s.units, units[s.name]) for s in sites}
    remove_units(pruned, Plan(teacher.config.model_type, kept))
    student = make_student(teacher, stage, [batch])
    torch.testing.assert_close(logits(student, batch), logits(pruned, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_fewer_layers_are_the_teacher_without_the_others(tiny, inputs_for, logits, name):
    teacher, batch = tiny(name), inputs_for(name)
    student = make_student(teacher, Student(layers=1), [batch])
    assert len(layer_modules(student)) == 1
    shorter = copy.deepcopy(teacher)
    layers = next(m for m in shorter.modules() if isinstance(m, torch.nn.ModuleList))
    del layers[: len(layers) - 1]  # uniform: the last layer alone
    layers[0].layer_idx = 0
    for module in layers[0].modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0
    shorter.config.num_hidden_layers = 1
    torch.testing.assert_close(logits(student, batch), logits(shorter, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_a_narrower_student_has_parts_of_the_teacher_and_loads_anywhere(
    tiny, inputs_for, tmp_path, name
):
    teacher, batch = tiny(name), inputs_for(name)
    stage = Student(layers=1, hidden=16, heads=2, neurons=24)
    choice = choose(teacher, stage, [batch])
    student = make_student(teacher, stage, [batch])
    theirs, hidden = teacher.get_input_embeddings().weight, list(choice.hidden)
    torch.testing.assert_close(student.get_input_embeddings().weight, theirs[:, hidden])
    assert hidden == sorted(set(hidden))
    assert len(hidden) == 16
    site = next(s for s in find_sites(teacher) if s.layer == choice.layers[0] and s.kind == "heads")
    assert len(choice.units[site.name]) == 2
    output = student.train()(**batch)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    student.save_pretrained(tmp_path)
    assert not hasattr(student.config, "quantization_config")
    if name != "gpt2":
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded.get_input_embeddings().weight, theirs[:, hidden])


def narrowed(model, count=24):
    """A model with some channels of its hidden width removed, which its config does not say."""
    (site,) = find_sites(model, [HIDDEN])
    kept = torch.randperm(site.units, generator=torch.Generator().manual_seed(2))[:count]
    plan = {site.name: SitePlan(HIDDEN, site.units, tuple(sorted(kept.tolist())))}
    remove_units(model, Plan(model.config.model_type, plan))
    assert model.config.get_text_config().hidden_size == 32
    return model


def without(teacher, choice):
    """The teacher without the heads and neurons that a student did not take."""
    pruned = copy.deepcopy(teacher)
    sites = find_sites(teacher)
    kept = {s.name: SitePlan(s.kind, s.units, choice.units[s.name]) for s in sites}
    remove_units(pruned, Plan(teacher.config.model_type, kept))
    return pruned


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_a_student_of_a_teacher_whose_hidden_width_was_pruned(tiny, inputs_for, logits, name):
    teacher, batch = narrowed(tiny(name)), inputs_for(name)
    stage = Student(heads=3, neurons=20)
    student = make_student(teacher, stage, [batch])
    expected = without(teacher, choose(teacher, stage, [batch]))
    torch.testing.assert_close(logits(student, batch), logits(expected, batch), atol=1e-5, rtol=0)
    assert student.config.hidden_size == 24
    assert not hasattr(student.config, "quantization_config")
    narrower = make_student(teacher, Student(hidden=16, heads=2), [batch])
    assert narrower.get_input_embeddings().weight.shape[1] == 16
    assert teacher.config.hidden_size == 32


def test_heads_may_have_a_width_of_their_own(tiny, inputs_for, logits):
    """Where a config says how wide heads are, a student has those of its narrowed teacher."""
    teacher, batch = narrowed(tiny("llama")), inputs_for("llama")
    student = make_student(teacher, Student(), [batch])
    assert torch.equal(logits(student, batch), logits(teacher, batch))


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_a_student_of_a_teacher_with_fewer_heads(tiny, inputs_for, logits, name):
    teacher, batch = tiny(name), inputs_for(name)
    heads = [site for site in find_sites(teacher) if site.kind == "heads"]
    half = {s.name: SitePlan("heads", s.units, tuple(range(s.units // 2))) for s in heads}
    remove_units(teacher, Plan(teacher.config.model_type, half))
    told = {} if name == "llama" else {"hidden": 16}
    student = make_student(teacher, Student(**told), [batch])
    assert {s.units for s in find_sites(student, ["heads"])} == {heads[0].units // 2}
    if name == "llama":
        assert torch.equal(logits(student, batch), logits(teacher, batch))


def test_sizes_are_those_that_the_teacher_has_by_now(tiny, inputs_for):
    teacher, batch = narrowed(tiny("bert")), inputs_for("bert")
    with pytest.raises(ConfigError, match=r"hidden=32 is more than the teacher's 24"):
        make_student(teacher, Student(hidden=32), [batch])
    with pytest.raises(ConfigError, match=r"is 6 in the student and 8 .* write heads=3\."):
        make_student(teacher, Student(), [batch])
    random = make_student(teacher, Student(init="normal"))
    assert random.bert.embeddings.LayerNorm.weight.shape == (24,)


def test_each_matrix_is_the_chosen_rows_and_columns(tiny, inputs_for):
    """BERT by hand: a query by heads and hidden width, the feed-forward by neurons and width."""
    teacher, batch = tiny("bert"), inputs_for("bert")
    stage = Student(layers=1, hidden=16, heads=2, neurons=24)
    choice = choose(teacher, stage, [batch])
    student = make_student(teacher, stage, [batch])
    theirs = teacher.bert.encoder.layer[choice.layers[0]]
    ours = student.bert.encoder.layer[0]
    name = f"encoder.layer.{choice.layers[0]}"
    rows = [h * 8 + i for h in choice.units[f"{name}.attention"] for i in range(8)]
    hidden, neurons = list(choice.hidden), list(choice.units[f"{name}.ffn"])
    query = theirs.attention.self.query
    assert torch.equal(ours.attention.self.query.weight, query.weight[rows][:, hidden])
    assert torch.equal(ours.attention.self.query.bias, query.bias[rows])
    dense = theirs.attention.output.dense
    assert torch.equal(ours.attention.output.dense.weight, dense.weight[hidden][:, rows])
    assert torch.equal(ours.attention.output.dense.bias, dense.bias[hidden])
    up, down = theirs.intermediate.dense, theirs.output.dense
    assert torch.equal(ours.intermediate.dense.weight, up.weight[neurons][:, hidden])
    assert torch.equal(ours.output.dense.weight, down.weight[hidden][:, neurons])
    assert torch.equal(ours.output.LayerNorm.weight, theirs.output.LayerNorm.weight[hidden])


def test_layers_by_score_are_those_that_turn_the_hidden_state_most(tiny, inputs_for):
    teacher, batch = tiny("distilbert"), inputs_for("distilbert")
    output = teacher(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    )
    mask = batch["attention_mask"].bool()
    states = [state[mask].detach() for state in output.hidden_states]
    turns = [
        float((1 - torch.cosine_similarity(a, b, dim=-1)).sum())
        for a, b in itertools.pairwise(states)
    ]
    best = sorted(sorted(range(3), key=lambda i: -turns[i])[:2])
    stage = Student(layers=2, pick_layers="score")
    assert list(choose(teacher, stage, [batch]).layers) == best


@pytest.mark.parametrize("init", ["normal", "xavier"])
def test_random_students_are_seeded(tiny, init):
    stage = Student(layers=1, hidden=24, heads=2, neurons=20, init=init)
    first, second = (make_student(tiny("bert"), stage, seed=3) for _ in range(2))
    other = make_student(tiny("bert"), stage, seed=4)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight = first.get_parameter(name)
    assert torch.equal(weight, second.get_parameter(name))
    assert not torch.equal(weight, other.get_parameter(name))
    expected = 0.02 if init == "normal" else (2 / (24 + 20)) ** 0.5
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1)
    assert torch.equal(first.bert.embeddings.LayerNorm.weight, torch.ones(24))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert", {"hidden": 64, "heads": 4}, "hidden=64 is more than the teacher's 32"),
        ("bert", {"hidden": 18, "heads": 4}, "hidden=18 is not a multiple of heads=4"),
        ("bert", {"hidden": 16}, "hidden / heads is 4 in the student and 8 in the teacher"),
        ("llama", {"hidden": 16, "heads": 1}, "under grouped queries a student keeps"),
    ],
)
def test_sizes_that_cannot_be(tiny, inputs_for, name, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_student(tiny(name), Student(**fields), [inputs_for(name)])


def test_a_pruned_teacher_and_no_data_are_refused(tiny, uneven_plan):
    with pytest.raises(DataError, match="needs batches to choose by"):
        make_student(tiny("bert"), Student(layers=1))
    teacher = tiny("bert")
    remove_units(teacher, uneven_plan(teacher))
    with pytest.raises(ConfigError, match="whose layers all have the same widths"):
        make_student(teacher, Student(layers=1))

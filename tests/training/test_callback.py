"""Pruning, teaching and holding zeros inside an ordinary Trainer."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_prune import DistillCallback, KeepZeros, PruneCallback, remove_units, save_model
from hf_prune.errors import ConfigError
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import magnitude_masks

SCHEDULE = {"kind": "cubic", "start": 0.0, "end": 0.6, "every": 2}


def rows(count=48):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (count, 8), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [index % 3 for index in range(count)]})


def recipe(**stage):
    prune = {
        "stage": "prune",
        "criterion": "taylor",
        "sparsity": 0.5,
        "schedule": SCHEDULE,
        **stage,
    }
    return {"stages": [prune, {"stage": "train"}]}


def trainer(model, folder, *callbacks, **options):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks))


def test_the_model_is_small_at_the_end_and_loads(tiny, tmp_path):
    model = tiny("bert")
    before = sum(p.numel() for p in model.parameters())
    callback = PruneCallback(recipe())
    job = trainer(model, tmp_path / "t", callback)
    job.train()
    assert callback.selection.met
    gone = before - sum(p.numel() for p in model.parameters())
    assert gone == callback.selection.outcomes[0].removed
    job.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = torch.randint(5, 99, (2, 7))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_loaded_model_can_be_fine_tuned_and_pruned_further(tiny, uneven_plan, tmp_path):
    model = tiny("bert")
    remove_units(model, uneven_plan(model))
    save_model(model, tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    name = "bert.encoder.layer.1.output.dense.weight"
    before = loaded.get_parameter(name).detach().clone()
    trainer(loaded, tmp_path / "t").train()
    assert not torch.equal(before, loaded.get_parameter(name))
    size = sum(p.numel() for p in loaded.parameters())
    trainer(loaded, tmp_path / "t", PruneCallback(recipe(sparsity=0.2))).train()
    assert sum(p.numel() for p in loaded.parameters()) < size
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    pairs = zip(loaded.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_training_goes_on_after_removal(tiny, tmp_path):
    """The optimizer of a Trainer outlives train(): it must hold the new parameters."""
    model = tiny("bert")
    job = trainer(model, tmp_path, PruneCallback(recipe()))
    job.train()
    job.callback_handler.callbacks = [
        c for c in job.callback_handler.callbacks if not isinstance(c, PruneCallback)
    ]
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    before = model.get_parameter(name).detach().clone()
    job.train()
    assert not torch.equal(before, model.get_parameter(name))


def test_gates_hold_what_training_would_move(tiny, tmp_path):
    """The pruned model is the one that was trained with its gates closed."""
    model = tiny("bert")
    callback = PruneCallback(recipe())
    seen = {}

    class Look(PruneCallback):
        def on_train_end(self, args, state, control, **kwargs):
            kwargs["model"].eval()
            seen["masked"] = kwargs["model"](ids).logits.detach()
            super().on_train_end(args, state, control, **kwargs)

    callback = Look(recipe())
    ids = torch.randint(5, 99, (2, 7))
    trainer(model, tmp_path, callback).train()
    torch.testing.assert_close(model.eval()(ids).logits, seen["masked"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("units", [["heads"], ["weights"]])
def test_what_is_to_be_ignored_must_be_there(units, tiny, tmp_path):
    """Said before the first step, not when masks begin to close."""
    late = {"start": 0.5, "end": 1.0}
    told = {"units": units, "criterion": "magnitude", "solver": "uniform", "schedule": late}
    job = trainer(tiny("bert"), tmp_path, PruneCallback(recipe(**told, ignore=["*.layer.7.*"])))
    with pytest.raises(ConfigError, match=r"nothing is called '\*\.layer\.7\.\*'"):
        job.train()
    assert job.state.global_step == 0


@pytest.mark.parametrize("solver", ["uniform", "global"])
def test_single_weights_stay_zero(tiny, tmp_path, solver):
    model = tiny("bert")
    callback = PruneCallback(
        recipe(units=["weights"], criterion="magnitude", solver=solver, ignore=["classifier.*"])
    )
    trainer(model, tmp_path, callback, weight_decay=0.1).train()
    assert callback.masks
    for name, mask in callback.masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
    removed = sum(int((~mask).sum()) for mask in callback.masks.values())
    total = sum(mask.numel() for mask in callback.masks.values())
    assert 0 <= removed - 0.5 * total <= len(callback.masks)


def test_keep_zeros_works_alone(tiny, tmp_path):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model), 0.5)
    before = model.classifier.weight.detach().clone()
    trainer(model, tmp_path, KeepZeros(masks), gradient_accumulation_steps=2).train()
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks.items())
    assert not torch.equal(before, model.classifier.weight)


def test_a_teacher_pulls_the_student_towards_itself(tiny, tmp_path):
    teacher = tiny("bert")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.classifier.parameters():
            parameter.mul_(-1)
    ids = torch.tensor(rows()["input_ids"])

    def distance():
        student.eval()
        with torch.no_grad():
            return float((student(ids).logits - teacher(ids).logits).square().mean())

    before, weights = distance(), [p.detach().clone() for p in teacher.parameters()]
    trainer(student, tmp_path, DistillCallback(teacher, alpha=1.0)).train()
    assert distance() < 0.8 * before
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.parameters(), strict=True))
    assert not student._forward_hooks


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"criterion": "fisher"}, "needs .*projected_fisher.*does not provide"),
        ({"criterion": "tailor"}, "did you mean 'taylor'"),
        ({"solver": "globl"}, "did you mean 'global'"),
        ({"projections": 4}, "projections=4: criterion 'taylor' draws none"),
        ({"units": ["weights"], "criterion": "magnitude", "projections": 4}, "training draws none"),
        ({"schedule": None}, "exactly one prune stage that has a schedule"),
    ],
)
def test_recipes_that_cannot_be_followed(stage, message):
    with pytest.raises(ConfigError, match=message):
        PruneCallback(recipe(**stage))


def test_training_that_stops_right_after_a_decision_still_ends_small(tiny, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    callback = PruneCallback(recipe())  # decides at steps 2, 4 and 6
    trainer(tiny("bert"), tmp_path, callback, Stop()).train()
    assert callback.selection.met


def test_a_teacher_of_other_classes_is_refused(tiny, tmp_path):
    teacher = tiny("bert")
    teacher.config.num_labels = 5
    with pytest.raises(ConfigError, match="num_labels is 3 in the student and 5"):
        trainer(tiny("bert"), tmp_path, DistillCallback(teacher)).train()

"""A training that was broken off and goes on ends as one that was not, bit by bit."""

import os
import shutil
import signal

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune import DistillCallback, PruneCallback, last_checkpoint
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.training.state import read_state

STEPS = 12


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Breaks training off right after a step, with nothing cleaned up."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def rows(count=40):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (count, 8), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [index % 3 for index in range(count)]})


def recipe(schedule=None, **stage):
    schedule = {"kind": "cubic", "end": 0.7, "every": 2, **(schedule or {})}
    prune = {"stage": "prune", "criterion": "taylor", "solver": "global", "sparsity": 0.5}
    return {"stages": [{**prune, **stage, "schedule": schedule}, {"stage": "train"}]}


def joint(**stage):
    """Heads and neurons, and single weights of what stays."""
    whole = recipe(**stage)
    structure, train = whole["stages"]
    single = {
        "stage": "prune",
        "units": ["weights"],
        "criterion": "magnitude",
        "solver": "global",
        "sparsity": 0.4,
        "ignore": ["classifier*"],
        "schedule": structure["schedule"],
    }
    return {"stages": [structure, single, train]}


def trainer(model, folder, *callbacks, **options):
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    job = TrainingArguments(folder, **arguments)
    data = rows()
    return Trainer(model, job, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


KINDS = {
    "taylor": recipe(),
    "regrow": recipe({"regrow": True}),
    "rewind": recipe({"rewind": True, "start": 0.2}),
    "movement": recipe(masks="movement"),
    "soft": recipe(masks="soft_movement"),
    "l0": recipe(masks="l0"),
    "coarse": recipe(
        masks="l0",
        coarse=["layers", "blocks"],
        min_heads=0,
        min_neurons=0,
        sparsity=None,
        target={"macs": "0.6x", "parameters": "0.9x"},
    ),
    "width": recipe(masks="l0", coarse=["hidden"], mask_learning_rate=0.5),
    "joint": joint(),
    "weights": recipe(units=["weights"], criterion="magnitude", solver="uniform"),
}


FAST = ("l0", "weights")


@pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in sorted(KINDS)]
)
def test_resumed_equals_uninterrupted(tiny, tmp_path, kind):
    def run(folder, *more, resume=None):
        model, callback = tiny("bert"), PruneCallback(KINDS[kind])
        trainer(model, folder, callback, *more).train(resume_from_checkpoint=resume)
        return model, callback

    expected, whole = run(tmp_path / "whole")
    for step in (5, 9):
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            run(folder, KillAt(step))
        checkpoint = last_checkpoint(folder)
        assert checkpoint.endswith(f"checkpoint-{step - 1}")
        found, resumed = run(folder, resume=checkpoint)
        assert resumed.plan.fingerprint() == whole.plan.fingerprint()
        assert found.state_dict().keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name


def test_distillation_resumes_with_its_projections(tiny, tmp_path):
    def run(folder, *more, resume=None):
        model = tiny("bert")
        callback = DistillCallback(tiny("electra"), alpha=0.8, hidden=1.0, layers="ordered")
        trainer(model, folder, callback, *more).train(resume_from_checkpoint=resume)
        return model

    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", KillAt(7))
    data, tensors = read_state(tmp_path / "killed" / "checkpoint-6", "distill")
    assert data["pairs"] is not None
    assert not torch.equal(tensors["hidden.weight"], torch.eye(32))
    found = run(tmp_path / "killed", resume=last_checkpoint(tmp_path / "killed"))
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_checkpoint_that_one_of_the_callbacks_has_not_written_is_passed_over(tiny, tmp_path):
    """A kill between two of them leaves the state of the first, whole by itself."""
    teacher = DistillCallback(tiny("electra"), alpha=0.8, hidden=1.0)
    with pytest.raises(Killed):
        trainer(tiny("bert"), tmp_path, PruneCallback(recipe()), teacher, KillAt(7)).train()
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    folder = tmp_path / "checkpoint-6" / "hf_prune"
    assert sorted(path.stem for path in folder.glob("*.json")) == ["distill", "structure"]
    (folder / "distill.json").unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")
    with pytest.raises(CheckpointError, match=r"distill\.json is missing"):
        read_state(folder.parent, "structure")


def test_a_torn_random_state_is_noticed(tiny, tmp_path):
    """The Trainer would go on without it, and drop other units than before."""
    with pytest.raises(Killed):
        trainer(tiny("bert"), tmp_path, PruneCallback(recipe()), KillAt(7)).train()
    path = tmp_path / "checkpoint-6" / "rng_state.pth"
    path.write_bytes(path.read_bytes()[:-1])
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")


def test_checkpoints_that_cannot_be_resumed(tiny, tmp_path):
    with pytest.raises(Killed):
        trainer(tiny("bert"), tmp_path, PruneCallback(recipe()), KillAt(7)).train()

    def resume(other=None, name="checkpoint-6"):
        callback = PruneCallback(other or recipe())
        job = trainer(tiny("bert"), tmp_path, callback)
        job.train(resume_from_checkpoint=str(tmp_path / name))

    with pytest.raises(CheckpointError, match="another prune stage, seed or number of steps"):
        resume(recipe(sparsity=0.4))
    state = tmp_path / "checkpoint-6" / "hf_prune" / "structure.json"
    tensors = state.with_suffix(".safetensors")
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"structure\.safetensors is damaged"):
        resume()
    assert last_checkpoint(tmp_path).endswith("checkpoint-4"), "a damaged state is passed over"
    tensors.write_bytes(data)
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    optimizer = tmp_path / "checkpoint-6" / "optimizer.pt"
    shutil.copy(optimizer, tmp_path / "aside")
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert last_checkpoint(tmp_path).endswith("checkpoint-4"), "so is one with a torn file"
    shutil.copy(tmp_path / "aside", optimizer)
    state.write_text("{")
    with pytest.raises(CheckpointError, match=r"structure\.json is damaged"):
        resume()
    state.unlink()
    with pytest.raises(CheckpointError, match="no complete state of hf_prune"):
        resume()
    shutil.rmtree(tmp_path / "checkpoint-6" / "hf_prune")
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_another_distillation_cannot_be_resumed(tiny, tmp_path):
    def callback(**fields):
        return DistillCallback(tiny("electra"), **{"temperature": 2.0, "alpha": 0.8, **fields})

    def resume(folder, **fields):
        job = trainer(tiny("bert"), tmp_path / folder, callback(**fields), max_steps=STEPS + 2)
        job.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-6"))

    for folder, fields in (("fixed", {}), ("moving", {"ends": {"alpha": 0.2}})):
        with pytest.raises(Killed):
            trainer(tiny("bert"), tmp_path / folder, callback(**fields), KillAt(7)).train()
    for fields in ({"alpha": 0.5}, {"temperature": 1.0}, {"hidden": 1.0}):
        with pytest.raises(CheckpointError, match="was written with another distillation"):
            resume("fixed", **fields)
    with pytest.raises(CheckpointError, match="another number of steps"):
        resume("moving", ends={"alpha": 0.2})
    resume("fixed")  # more steps change nothing in a distillation whose alpha stays


def test_another_output_folder_needs_to_be_named(tiny, tmp_path):
    with pytest.raises(Killed):
        trainer(tiny("bert"), tmp_path / "a", PruneCallback(recipe()), KillAt(7)).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    with pytest.raises(CheckpointError, match="no complete state of hf_prune"):
        trainer(tiny("bert"), tmp_path / "b", PruneCallback(recipe())).train(
            resume_from_checkpoint=checkpoint
        )
    callback = PruneCallback(recipe(), resume_from=checkpoint)
    trainer(tiny("bert"), tmp_path / "b", callback).train(resume_from_checkpoint=checkpoint)
    assert callback.selection.met


@pytest.mark.parametrize("masks", ["scored", "l0"])
def test_best_model_is_one_of_the_full_sparsity(tiny, tmp_path, masks):
    callback = PruneCallback(recipe(masks=masks))
    model = tiny("bert")
    job = trainer(
        model,
        tmp_path,
        callback,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=3e-2,  # so high that the last model is not the best one
    )
    job.train()
    losses = {e["step"]: e["eval_loss"] for e in job.state.log_history if "eval_loss" in e}
    full = {step: loss for step, loss in losses.items() if step >= 8}
    best = min(full, key=full.get)
    assert job.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert callback.selection.met
    assert job.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-4)


def test_ctrl_c_finishes_the_step_and_saves(tiny, tmp_path):
    class Press(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    teacher = DistillCallback(tiny("electra"))
    model = tiny("bert")
    with pytest.raises(KeyboardInterrupt, match="stopped and saved at step 5"):
        trainer(model, tmp_path, PruneCallback(recipe()), teacher, Press(), **options).train()
    assert signal.getsignal(signal.SIGINT) is before
    assert last_checkpoint(tmp_path).endswith("checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "hf_prune" / "distill.json").exists()
    weights = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert weights[name].shape == (32, 32), "nothing is removed before the end"
    callback = PruneCallback(recipe())
    job = trainer(tiny("bert"), tmp_path, callback, DistillCallback(tiny("electra")), **options)
    job.train(resume_from_checkpoint=True)
    assert callback.selection.met


def test_a_metric_floor_brings_the_last_good_plan_back(tiny, tmp_path):
    metrics = iter([0.9, 0.8, 0.4, 0.9, 0.9, 0.9, 0.9])
    stage = recipe({"stop_metric": "accuracy", "stop_below": 0.7})
    callback = PruneCallback(stage)
    plans = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            plans.append((state.global_step, callback.selection.plan.fingerprint()))

    job = trainer(tiny("bert"), tmp_path, callback, Look(), eval_strategy="steps", eval_steps=2)
    job.compute_metrics = lambda _: {"accuracy": next(metrics)}
    job.train()
    assert callback.stopped
    assert [step for step, _ in plans] == [2, 4, 6, 8, 10, 12]
    good = plans[1][1]
    assert [mark for _, mark in plans[2:]] == [good] * 4, "back to the plan of step 4, for good"
    assert callback.plan.fingerprint() == good
    assert 0 < callback.selection.outcomes[0].removed < callback.selection.outcomes[0].total / 2


def test_a_metric_that_evaluation_does_not_give(tiny, tmp_path):
    callback = PruneCallback(recipe({"stop_metric": "f1", "stop_below": 0.7}))
    job = trainer(tiny("bert"), tmp_path, callback, eval_strategy="steps", eval_steps=2)
    with pytest.raises(ConfigError, match=r"evaluation gives no 'eval_f1', only .*eval_loss"):
        job.train()


@pytest.mark.parametrize("kind", ["taylor", "l0", "weights"])
def test_what_is_logged(tiny, tmp_path, kind):
    model = tiny("bert")
    before = sum(p.numel() for p in model.parameters())
    callback = PruneCallback(KINDS[kind])
    job = trainer(model, tmp_path, callback, save_strategy="no")
    job.train()
    logs = [e for e in job.state.log_history if "prune/sparsity" in e]
    assert len(logs) == STEPS // 2
    found = [entry["prune/sparsity"] for entry in logs]
    assert 0.5 <= found[-1] < 0.6  # a head of the tiny model is a large step
    if kind == "weights":
        return
    assert logs[-1]["prune/parameters"] == sum(p.numel() for p in model.parameters())
    assert logs[-1]["prune/parameters"] < before
    heads = sum(len(s.kept) for s in callback.plan.sites.values() if s.kind == "heads")
    assert logs[-1]["prune/kept_heads"] == heads
    assert 0 < logs[-1]["prune/macs"] < logs[0]["prune/macs"] or kind == "l0"


def test_trials_of_a_search_share_nothing(tiny, tmp_path):
    """Each trial starts with all gates open, and its states lie in its own folder."""
    pytest.importorskip("optuna")
    callback, seen = PruneCallback(recipe()), []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(callback.selection)

        def on_train_end(self, args, state, control, **kwargs):
            seen.append(callback.plan.fingerprint())

    job = trainer(tiny("bert"), tmp_path, callback, Look(), eval_strategy="steps", eval_steps=6)
    job.model_init = lambda trial=None: tiny("bert")
    best = job.hyperparameter_search(
        hp_space=lambda trial: {"seed": trial.suggest_categorical("seed", [3])},
        n_trials=2,
        backend="optuna",
    )
    assert best.objective > 0
    assert seen[0] is seen[2] is None
    assert callback.selection.met
    assert last_checkpoint(tmp_path / "run-1").endswith("checkpoint-12")

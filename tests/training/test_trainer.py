"""`prepare_trainer`: the same losses and plans however a batch is cut."""

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from test_resume import recipe, trainer
from transformers import TrainerCallback

from hf_prune import DistillCallback, KeepZeros, PruneCallback, prepare_trainer
from hf_prune.errors import ConfigError


def still(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def run(tiny, folder, **options):
    model = still(tiny("bert"))
    callbacks = PruneCallback(recipe()), DistillCallback(tiny("electra"), alpha=0.5)
    job = trainer(model, folder, *callbacks, save_strategy="no", logging_steps=1, **options)
    prepare_trainer(job).train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    return losses, callbacks[0].plan, model


def test_accumulation_changes_neither_losses_nor_the_plan(tiny, tmp_path):
    losses, plan, model = run(tiny, tmp_path)
    for steps in (2, 4):
        size = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        other_losses, other_plan, other = run(tiny, tmp_path, **size)
        assert other_losses == pytest.approx(losses, rel=2e-3)
        assert other_plan == plan
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, atol=2e-3, rtol=0)


def test_mixed_precision_changes_no_more_in_the_plan_than_its_rounding(tiny, tmp_path):
    _, plan, _ = run(tiny, tmp_path)
    _, other, model = run(tiny, tmp_path, bf16=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    same, kept, others = 0, 0, 0
    for name, site in plan.sites.items():
        if site.kind == "heads":
            assert other.sites[name] == site
        same += len(set(site.kept) & set(other.sites[name].kept))
        kept += len(site.kept)
        others += len(other.sites[name].kept)
    # how much a site keeps may move with the rounding too, which differs from machine to machine
    assert min(kept, others) >= 0.9 * max(kept, others)
    assert same >= 0.9 * min(kept, others)


def test_trackers_see_our_figures(tiny, tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    job = trainer(tiny("bert"), tmp_path, PruneCallback(recipe()), save_strategy="no")
    job.callback_handler.callbacks.insert(0, Tracker())  # where reporting callbacks stand
    prepare_trainer(job).train()
    assert "prune/sparsity" in seen[0]


def test_language_models_keep_their_own_count(tiny, tmp_path):
    assert prepare_trainer(trainer(tiny("gpt2"), tmp_path)).model_accepts_loss_kwargs
    assert not prepare_trainer(trainer(tiny("bert"), tmp_path)).model_accepts_loss_kwargs


@pytest.mark.parametrize("way", ["arguments", "launcher", "plugin"])
@pytest.mark.parametrize(("name", "title"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_sharded_training_is_refused(tiny, tmp_path, monkeypatch, name, title, way):
    for callback in (PruneCallback(recipe()), DistillCallback(tiny("bert")), KeepZeros({})):
        with monkeypatch.context() as patch:
            job = trainer(tiny("bert"), tmp_path, callback)
            if way == "arguments":
                patch.setattr(job.args, name, "on")
            elif way == "launcher":
                patch.setenv(f"ACCELERATE_USE_{title.upper()}", "true")
            else:
                kinds = AcceleratorState._shared_state, PartialState._shared_state
                for shared in kinds:
                    patch.setitem(shared, "distributed_type", DistributedType[title.upper()])
            kind = type(callback).__name__
            with pytest.raises(
                ConfigError, match=rf"{kind} does not support {title}: .* Leave {name} out"
            ):
                callback.on_train_begin(job.args, job.state, job.control, model=job.model)


def test_a_loss_function_beside_a_teacher_is_refused(tiny, tmp_path):
    job = trainer(tiny("bert"), tmp_path, DistillCallback(tiny("bert"), alpha=1.0))
    job.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs["loss"]
    with pytest.raises(ConfigError, match="compute_loss_func replaces the loss"):
        prepare_trainer(job)
    job = trainer(tiny("bert"), tmp_path, PruneCallback(recipe()))
    job.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs["loss"]
    prepare_trainer(job)

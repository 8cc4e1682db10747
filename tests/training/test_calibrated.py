"""Decisions by calibration while a model trains: those of `compress`, in the model that trains."""

from itertools import pairwise

import pytest
import torch
from test_resume import KillAt, Killed, recipe, trainer

from hf_prune import PruneCallback, compress, last_checkpoint
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, DataError
from hf_prune.measure.counts import count_encoder_parameters
from hf_prune.training.calibrated import _whole

KFAC = {"criterion": "kfac_obs", "solver": "knapsack", "sparsity": 0.5, "of": "layers"}
KFAC |= {"min_calibration_samples": 4, "calibration_samples": 32}


def batches(inputs_for, name, count=6):
    return [inputs_for(name, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("criterion", ["kfac_obs", "block_fisher"])
def test_one_decision_without_learning_is_compress(tiny, inputs_for, tmp_path, name, criterion):
    """The same plan, the same re-fitted weights, written into the model that trains."""
    model, known = tiny(name), batches(inputs_for, name)
    stage = {**KFAC, "criterion": criterion}
    once = {"stages": [{"stage": "prune", **stage}]}
    expected = compress(model, once, known)
    once = recipe({"kind": "one_shot", "end": 1.0, "every": 1}, **stage)
    callback = PruneCallback(once, calibration=known)
    callback.on_train_begin(_Arguments, _State(), None, model=model)
    callback.pruning.decide(1.0)
    with torch.no_grad():
        masked = model.eval()(**known[0]).logits
    callback.pruning.finish()
    assert callback.selection.plan.sites == expected.plan.sites
    assert any(site.removed for site in callback.selection.plan.sites.values())
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-6, rtol=1e-5, msg=key)
    with torch.no_grad():
        logits = model(**known[0]).logits
    torch.testing.assert_close(masked, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sites_that_lose_nothing_are_re_fitted_too(tiny, inputs_for, name):
    """Attention behind narrowed feed-forward blocks repairs what these lost, as in `compress`."""
    model, known = tiny(name), batches(inputs_for, name, 30)
    stage = {**KFAC, "units": ["neurons"], "sparsity": 0.2, "calibration_samples": 256}
    expected = compress(model, {"stages": [{"stage": "prune", **stage}]}, known).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    once = recipe({"kind": "one_shot", "end": 1.0, "every": 1}, **stage)
    callback = PruneCallback(once, calibration=known)
    callback.on_train_begin(_Arguments, _State(), None, model=model)
    callback.pruning.decide(1.0)
    callback.pruning.finish()
    wide = [k for k, v in expected.state_dict().items() if v.shape == before[k].shape]
    attention = [k for k in wide if "att" in k]
    assert any(not torch.equal(expected.state_dict()[k], before[k]) for k in attention)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["albert", "electra"])
def test_mixed_precision(tiny, inputs_for, tmp_path, name):
    """What enters the first layer is in bfloat16 while training, and in float32 for decisions."""
    model, known = tiny(name), batches(inputs_for, name)
    callback = PruneCallback(recipe({"every": 3}, **KFAC), calibration=known)
    trainer(model, tmp_path, callback, save_strategy="no", bf16=True).train()
    assert callback.selection.met
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "schedule", [{"rewind": True}, {"stop_metric": "accuracy", "stop_below": 0.5}]
)
def test_a_re_fit_that_would_be_taken_back_is_refused(inputs_for, schedule):
    """Weights that were re-fitted make up for units that have gone, and for no others."""
    known = batches(inputs_for, "bert", 1)
    with pytest.raises(ConfigError, match="reconstruct: false"):
        PruneCallback(recipe(schedule, **KFAC), calibration=known)
    PruneCallback(recipe(schedule, **KFAC, reconstruct=False), calibration=known)


def test_an_empty_calibration_set_is_refused(tiny, tmp_path):
    """It is not the same as none: an iterator may have been consumed, or a process have nothing."""
    callback = PruneCallback(recipe(), calibration=iter(()))
    with pytest.raises(DataError, match="calibration set is empty"):
        trainer(tiny("bert"), tmp_path, callback, save_strategy="no").train()


class _Arguments:
    fp16 = False
    deepspeed = None
    fsdp = ""


class _State:
    global_step = 0
    max_steps = 4

    def __init__(self):
        self.stateful_callbacks = {}


@pytest.mark.parametrize("solver", ["knapsack", "uniform"])
def test_nothing_comes_back_and_the_goal_is_met(tiny, inputs_for, tmp_path, solver):
    model = tiny("bert")
    before = count_encoder_parameters(model)
    stage = recipe({"end": 1.0, "every": 3}, **{**KFAC, "solver": solver})
    callback = PruneCallback(stage, calibration=iter(batches(inputs_for, "bert")))
    plans = []

    class Look(PruneCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if self.selection is not None:
                plans.append(self.selection.plan)

    callback.__class__ = Look
    trainer(model, tmp_path, callback, save_strategy="no").train()
    assert len({plan.fingerprint() for plan in plans}) >= 3
    for earlier, later in pairwise(plans):
        for name, site in later.sites.items():
            assert set(site.kept) <= set(earlier.sites[name].kept)
    assert callback.selection.met
    left = count_encoder_parameters(model)
    assert before - left == callback.selection.outcomes[0].removed >= 0.5 * before


def test_a_decision_re_fits_to_the_model_of_that_moment(tiny, inputs_for, tmp_path):
    """The second event repairs what it removes itself, and not what was learned since the first."""
    model, known = tiny("bert"), batches(inputs_for, "bert")
    errors = {}
    for refit in (True, False):
        torch.manual_seed(0)
        model = tiny("bert")
        stage = recipe({"end": 1.0, "every": 6}, **KFAC, reconstruct=refit)
        callback = PruneCallback(stage, calibration=known)
        callback.on_train_begin(_Arguments, _State(), None, model=model)
        callback.pruning.decide(0.5)
        with torch.no_grad():
            for parameter in model.parameters():  # as if it had learned
                parameter.mul_(1.05)
            aim = torch.cat([model.eval()(**batch).logits for batch in known])
        callback.pruning.decide(1.0)
        with torch.no_grad():
            found = torch.cat([model.eval()(**batch).logits for batch in known])
        errors[refit] = float((found - aim).square().mean())
        callback.pruning.finish()
    assert errors[True] < 0.8 * errors[False]


def test_a_killed_run_goes_on(tiny, inputs_for, tmp_path):
    known = batches(inputs_for, "bert")

    def run(folder, *more, resume=None):
        model = tiny("bert")
        callback = PruneCallback(recipe({"every": 3}, **KFAC), calibration=known)
        trainer(model, folder, callback, *more).train(resume_from_checkpoint=resume)
        return model, callback

    expected, whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", KillAt(8))
    found, resumed = run(tmp_path / "killed", resume=last_checkpoint(tmp_path / "killed"))
    assert resumed.plan.fingerprint() == whole.plan.fingerprint()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_rankings_of_what_is_left_speak_of_all_units():
    part = Ranking(torch.tensor([1, 0, 2]), torch.tensor([0.0, 1.0, 3.0, 6.0]).double())
    whole = _whole(part, (1, 3, 4), 5)
    assert sorted(whole.order[:2].tolist()) == [0, 2]
    assert whole.order[2:].tolist() == [3, 1, 4]
    assert whole.errors.tolist() == [0, 0, 0, 1, 3, 6]
    assert [whole.kept(k) for k in (1, 2, 3)] == [(4,), (1, 4), (1, 3, 4)]
    assert _whole(None, (), 3).error_of(0) == 0


def test_calibration_is_refused_where_nothing_reads_it(tiny, inputs_for):
    known = batches(inputs_for, "bert", 1)
    for stage in (
        {"masks": "l0"},
        {"units": ["weights"], "criterion": "magnitude", "solver": "uniform"},
    ):
        with pytest.raises(ConfigError, match="calibration is for heads and neurons"):
            PruneCallback(recipe(**stage), calibration=known)
    with pytest.raises(ConfigError, match="Pass calibration=batches to PruneCallback"):
        PruneCallback(recipe(**KFAC))
    with pytest.raises(ConfigError, match="regrow needs a criterion"):
        PruneCallback(recipe({"regrow": True}), calibration=known)

"""Channels of the hidden width that learn whether they stay, beside heads and neurons."""

import pytest
import torch
from test_learned import settles_alike, stage, still
from test_resume import joint, recipe, trainer

from hf_prune import PruneCallback, save_model
from hf_prune.errors import UnsupportedModelError
from hf_prune.measure.counts import count_encoder_parameters, count_macs, count_parameters
from hf_prune.measure.latency_table import shaped_like
from hf_prune.sites import HIDDEN
from hf_prune.training import hard_concrete
from hf_prune.training.learned import LearnedPruning

WIDTH = {"coarse": ("hidden",)}


def started(model, **fields):
    pruning = LearnedPruning(stage("l0", **{**WIDTH, **fields}), 0)
    pruning.start(model)
    return pruning


def close(pruning, *, channels=(), units=()):
    """Gates that are surely closed; the others are partly open."""
    pruning.parameters = torch.full_like(pruning.parameters, 0.7)
    pruning.parameters[list(units)] = -9.0
    pruning.parameters[[pruning.channels + c for c in channels]] = -9.0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "deberta-v2"])
def test_the_function_stays_the_same_when_channels_settle(tiny, inputs_for, name):
    """Closed channels are not in norms; what open ones let through is in the weights of readers."""
    model, batch = tiny(name), inputs_for(name)
    pruning = started(model, sparsity=0.25)
    close(pruning, channels=(1, 5, 6, 20))
    pruning.before_step()
    channels = pruning.gates.evaluation[HIDDEN]
    kept = pruning._flat(pruning._select_last())
    assert ((channels > 0.5) & (channels < 1)).sum() == 28
    assert kept[pruning.units :].sum() == 25, "as many as are expected to be open"
    values = hard_concrete.expected(pruning.parameters.detach())
    pruning.gates.evaluation = pruning._by_site(values * kept)
    settles_alike(pruning, model, batch)
    assert model.get_input_embeddings().weight.shape[1] == 25


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_channels_learn_from_the_loss(tiny, inputs_for, name):
    """The gradient of each gate is that of finite differences, while no norm loses a channel."""
    model, batch = still(tiny(name)), inputs_for(name)
    pruning = started(model)
    close(pruning)
    pruning.before_step()
    gate = pruning.gates.values[HIDDEN].detach().clone().clamp(0.2, 0.9)
    pruning.gates.values = {HIDDEN: gate.clone().requires_grad_()}
    model(**batch).loss.backward()
    slopes = pruning.gates.values[HIDDEN].grad
    model.double()

    def loss(index, value):
        pruning.gates.values = {HIDDEN: gate.double()}
        pruning.gates.values[HIDDEN][index] = value
        with torch.no_grad():
            return float(model(**batch).loss)

    for index in (0, 7, 31):
        step = 1e-2  # norms of llama compute in float32
        found = (loss(index, gate[index] + step) - loss(index, gate[index] - step)) / (2 * step)
        assert float(slopes[index]) == pytest.approx(found, rel=1e-2, abs=1e-4)
    assert slopes.abs().min() > 0
    pruning.gates.remove()


@pytest.mark.parametrize(
    ("goal", "count"),
    [
        ({"sparsity": None, "target": {"parameters": "0.6x"}}, count_parameters),
        ({"sparsity": None, "target": {"macs": "0.6x"}}, lambda m: count_macs(m, 8)),
        ({"sparsity": 0.4, "of": "layers"}, count_encoder_parameters),
    ],
    ids=["parameters", "macs", "layers"],
)
def test_the_goal_is_met_where_channels_go_too(tiny, tmp_path, goal, count):
    model = tiny("bert")
    before = count(model)
    fields = {**WIDTH, "sequence_length": 8, "mask_learning_rate": 0.3, **goal}
    callback = PruneCallback(recipe({"end": 0.9, "every": 1}, masks="l0", **fields))
    job = trainer(model, tmp_path, callback, save_strategy="no", max_steps=60)
    job.train()
    assert callback.selection.met
    assert (
        len(callback.plan.sites[HIDDEN].kept) == model.get_input_embeddings().weight.shape[1] < 32
    )
    assert count(model) <= 0.6 * before
    outcome = callback.selection.outcomes[0]
    assert outcome.total == before
    # what a bias or a norm has is not of units, so the last few parameters may differ
    assert outcome.removed == pytest.approx(before - count(model), rel=0.02)
    last = [entry for entry in job.state.log_history if "prune/parameters" in entry][-1]
    assert last["prune/parameters"] == count_parameters(model)
    assert last["prune/kept_hidden"] == model.get_input_embeddings().weight.shape[1]


def test_what_gates_are_expected_to_remove_is_what_removal_removes(tiny):
    model = tiny("bert")
    pruning = started(model, sparsity=0.5, of="layers")
    for channels, units in (((), ()), (range(8), ()), (range(16), range(0, 40, 2))):
        pruning.parameters = torch.full_like(pruning.parameters, 12.0)
        close_at = [*units, *(pruning.channels + c for c in channels)]
        pruning.parameters[close_at] = -12.0
        with torch.no_grad():
            expected = float(pruning._expected_to_go()[0])
        opened = hard_concrete.open_probability(pruning.parameters)
        parts = pruning._by_site(pruning._effective(opened))
        counts = {name: int((part > 0.5).sum()) for name, part in parts.items()}
        left = count_encoder_parameters(shaped_like(model, counts))
        assert expected == pytest.approx(1 - left / count_encoder_parameters(model), abs=0.02)
    pruning.gates.remove()


def test_the_lagrangian_closes_channels_before_they_are_forced(tiny, tmp_path):
    fields = {**WIDTH, "mask_learning_rate": 0.3, "sparsity": 0.6, "of": "layers"}
    callback = PruneCallback(recipe({"end": 1.0, "every": 1}, masks="l0", **fields))
    seen = []

    class Look(PruneCallback):
        def on_step_end(self, args, state, control, **kwargs):
            opened = hard_concrete.open_probability(self.pruning.parameters.detach())
            seen.append((self.pruning.sparsity, float(opened[self.pruning.channels :].mean())))
            super().on_step_end(args, state, control, **kwargs)

    callback.__class__ = Look
    trainer(tiny("bert"), tmp_path, callback, save_strategy="no", max_steps=160).train()
    assert seen[0][0] < 0.1
    assert seen[0][1] > 0.9
    assert seen[-2][0] == pytest.approx(0.6, abs=0.08)
    assert seen[-2][1] < 0.9
    assert callback.selection.met


def test_a_model_that_learned_its_width_is_loaded(tiny, inputs_for, tmp_path):
    model, batch = tiny("gpt2"), inputs_for("gpt2")
    pruning = started(model, sparsity=0.4)
    close(pruning, channels=range(4))
    pruning.decide(1.0)
    pruning.finish()
    save_model(model, tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_single_weights_go_beside_channels(tiny, tmp_path):
    model = tiny("bert")
    fields = {"masks": "l0", "coarse": ["hidden"], "mask_learning_rate": 0.5}
    callback = PruneCallback(joint(**fields))
    trainer(model, tmp_path, callback, save_strategy="no", max_steps=40).train()
    assert len(callback.plan.sites[HIDDEN].kept) < 32
    for name, mask in callback.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


def test_experts_have_no_gate_of_the_hidden_width(tiny):
    with pytest.raises(UnsupportedModelError, match="leave hidden out of coarse"):
        started(tiny("mixtral"))

"""Masks that are learned: they see gradients through closed gates, and end at the goal."""

import math

import pytest
import torch
from test_resume import recipe, trainer

from hf_prune import PruneCallback, targets
from hf_prune.errors import ConfigError
from hf_prune.measure import latency_table
from hf_prune.measure.counts import count_macs, count_parameters
from hf_prune.recipe import Prune, Schedule
from hf_prune.sites import find_sites
from hf_prune.targets import Chooser
from hf_prune.training import hard_concrete
from hf_prune.training.learned import LearnedPruning
from hf_prune.training.structure import StructuredPruning


def stage(masks="movement", **fields):
    schedule = fields.pop("schedule", {})
    return Prune(
        criterion="taylor",
        solver="global",
        masks=masks,
        schedule=Schedule(**schedule),
        **{"sparsity": 0.5, **fields},
    )


def still(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def settles_alike(pruning, model, batch):
    """What gates let through in evaluation is what the settled and the smaller model compute."""
    with torch.no_grad():
        masked = model.eval()(**batch).logits
        pruning.decide(1.0)
        settled = model(**batch).logits
        pruning.finish()
        small = model(**batch).logits
    torch.testing.assert_close(settled, masked, atol=1e-5, rtol=0)
    torch.testing.assert_close(small, masked, atol=1e-5, rtol=0)


def test_hard_concrete_by_sampling():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    noise = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    drawn = hard_concrete.sample(log_alpha, noise)  # [N, U]
    assert 0 <= drawn.min() < drawn.max() <= 1
    opened = (drawn > 0).float().mean(dim=0)
    torch.testing.assert_close(hard_concrete.open_probability(log_alpha), opened, atol=5e-3, rtol=0)
    expected = [min(1, max(0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in log_alpha.tolist()]
    torch.testing.assert_close(hard_concrete.expected(log_alpha), torch.tensor(expected))


@pytest.mark.parametrize("masks", ["movement", "soft_movement"])
def test_movement_follows_the_gradient_of_every_gate(tiny, inputs_for, masks):
    """Closed ones too, as in the loss of a model with another gate, by finite differences."""
    model, batch = still(tiny("bert")), inputs_for("bert")
    pruning = LearnedPruning(stage(masks, mask_penalty=0.0), 0)
    pruning.start(model)
    pruning.decide(0.6)
    gates = torch.cat([g.detach() for g in pruning.gates.values.values()])
    assert 0 < gates.sum() < len(gates) or masks == "soft_movement"
    before = pruning.parameters.clone()
    model(**batch).loss.backward()
    pruning.observe()
    moved = (before - pruning.parameters) / pruning.stage.mask_learning_rate

    def loss(index, value):
        changed = gates.clone().double()
        changed[index] = value
        parts = changed.split([site.units for site in pruning.sites])
        sites = zip(pruning.sites, parts, strict=True)
        pruning.gates.values = {site.name: part.float() for site, part in sites}
        with torch.no_grad():
            return float(model.double()(**batch).loss)

    for index in (0, 3, int((gates == 0).nonzero()[0]) if masks == "movement" else 5):
        slope = (loss(index, gates[index] + 1e-3) - loss(index, gates[index] - 1e-3)) / 2e-3
        assert float(moved[index]) == pytest.approx(slope, rel=2e-3, abs=1e-5)
    pruning.gates.remove()


def test_soft_movement_closes_what_its_penalty_pushes_down_but_not_past_the_goal(tiny):
    pruning = LearnedPruning(stage("soft_movement"), 0)
    pruning.start(tiny("bert"))
    pruning.parameters = torch.randn(
        len(pruning.parameters), generator=torch.Generator().manual_seed(0)
    )
    pruning.decide(0.5)
    gates = torch.cat([g.detach() for g in pruning.gates.values.values()])
    wanted = pruning._flat(pruning._select(1.0))
    assert torch.equal(gates, torch.maximum(wanted, (pruning.parameters >= 0).float()))
    pruning.parameters = torch.full_like(pruning.parameters, -1.0)
    pruning.decide(0.5)
    assert 0.5 <= pruning.sparsity < 0.6  # a head of the tiny model is a large step
    pruning.gates.remove()


@pytest.mark.parametrize("masks", ["movement", "soft_movement", "l0"])
def test_learned_masks_end_at_the_goal_and_small(tiny, tmp_path, masks):
    model = tiny("bert")
    before = sum(p.numel() for p in model.parameters())
    callback = PruneCallback(recipe(masks=masks))
    trainer(model, tmp_path, callback, save_strategy="no").train()
    assert callback.selection.met
    gone = before - sum(p.numel() for p in model.parameters())
    assert gone == callback.selection.outcomes[0].removed


def test_goals_in_macs_are_met_too(tiny):
    pruning = LearnedPruning(stage("l0", cost="macs"), 0)
    pruning.start(tiny("llama"))
    pruning.decide(1.0)
    assert pruning.selection.met
    assert pruning.selection.outcomes[0].cost == "macs"
    pruning.gates.remove()


def test_l0_reaches_its_goal_in_expectation_before_it_is_forced(tiny, tmp_path):
    """The Lagrangian, not the solver, closes the gates: by the end hardly any decision is left."""
    callback = PruneCallback(recipe({"end": 1.0, "every": 1}, masks="l0", mask_learning_rate=0.3))
    seen = []

    class Look(PruneCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(self.pruning.sparsity)
            super().on_step_end(args, state, control, **kwargs)

    callback.__class__ = Look
    job = trainer(tiny("bert"), tmp_path, callback, save_strategy="no", max_steps=80)
    job.train()
    assert seen[0] < 0.05
    assert seen[-2] == pytest.approx(0.5, abs=0.08)


COARSE = {"coarse": ("layers", "blocks"), "min_heads": 0, "min_neurons": 0}


@pytest.mark.parametrize("fields", [{}, COARSE], ids=["fine", "coarse"])
def test_l0_is_the_same_function_before_and_after_it_settles(tiny, inputs_for, fields):
    """What gates let through in evaluation is written into the weights when they become 0 and 1."""
    model, batch = tiny("gpt2"), inputs_for("gpt2")
    pruning = LearnedPruning(stage("l0", **fields), 0)
    pruning.start(model)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(len(pruning.parameters), generator=generator)
    pruning.parameters = torch.where(drawn < 0.6, -9.0, 0.7)  # closed for sure, or partly open
    pruning.parameters[pruning.units :] = 1.0  # coarse gates: partly open
    pruning.before_step()
    kept = pruning._flat(pruning._select(1.0))
    values = hard_concrete.expected(pruning.parameters.detach())
    coarse = float(values[-1]) ** 2 if fields else 1.0  # all are equal; a unit hangs on two
    gates = values[: pruning.units] * coarse * kept
    pruning.gates.evaluation = pruning._split(gates)
    assert ((gates > 0) & (gates < 1)).any()
    settles_alike(pruning, model, batch)


def test_a_closed_layer_and_a_closed_block_go_as_a_whole(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    fields = {**COARSE, "schedule": {"every": 1}}
    pruning = LearnedPruning(stage("l0", **fields), 0)
    pruning.start(model)
    layers, blocks = 2, 4
    assert len(pruning.parameters) == pruning.units + layers + blocks
    pruning.parameters[pruning.units + 1] = -9.0  # the second layer
    first_heads = next(s for s in pruning.sites if s.kind == "heads" and s.layer == 0)
    pruning.before_step()
    open_heads = pruning.gates.evaluation[first_heads.name]
    assert (open_heads > 0.9).all()
    for site in pruning.sites:
        assert (pruning.gates.evaluation[site.name] == 0).all() == (site.layer == 1)
    pruning.decide(1.0)
    kept = {s.name: len(pruning.selection.plan.sites[s.name].kept) for s in pruning.sites}
    assert pruning.selection.met
    assert all((kept[s.name] == 0) == (s.layer == 1) for s in pruning.sites)
    with torch.no_grad():
        before = model.eval()(**batch).logits
        pruning.finish()
        torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=0)


def test_expected_cost_by_sampling_all_gates(tiny):
    """Coarse gates times fine gates, drawn many times: the mean cost of what is open."""
    pruning = LearnedPruning(stage("l0", **COARSE), 0)
    pruning.start(tiny("bert"))
    generator = torch.Generator().manual_seed(0)
    pruning.parameters = torch.randn(len(pruning.parameters), generator=generator)
    with torch.no_grad():
        removed = float(pruning._expected_to_go()[0])
        noise = torch.rand(20_000, len(pruning.parameters), generator=generator)
        drawn = hard_concrete.sample(pruning.parameters, noise.clamp(1e-6, 1 - 1e-6))
        total = 0.0
        for row in drawn[:4000]:
            closed = (pruning._effective(row) == 0).float()
            total += float((closed * pruning.costs).sum()) / 4000
    assert removed == pytest.approx(total, abs=5e-3)
    assert 0.3 < removed < 0.95
    pruning.gates.remove()


def test_coarse_gates_learn_from_the_gradients_of_all_their_units(tiny, inputs_for):
    model, batch = still(tiny("bert")), inputs_for("bert")
    pruning = LearnedPruning(stage("l0", **COARSE), 0)
    pruning.start(model)
    pruning.before_step()
    values = pruning.parameters
    noise = torch.rand(len(values), generator=torch.Generator().manual_seed(pruning.seed))
    model(**batch).loss.backward()
    gates = torch.cat([g.grad for g in pruning.gates.values.values()])
    leaf = values.detach().clone().requires_grad_()
    sampled = hard_concrete.sample(leaf, noise.clamp(1e-6, 1 - 1e-6))
    expected = []
    for number in range(pruning.units, len(values)):  # one coarse gate at a time, by its units
        mine = sum((member == number - pruning.units).float() for member in pruning.members)
        without = pruning._effective(sampled.detach()) / sampled.detach()[number]
        expected.append(float((gates * mine * without).sum()))
    (slope,) = torch.autograd.grad(sampled.sum(), leaf)
    pruning.optimizer = torch.optim.SGD([values], lr=1.0)
    before, pruning.share = values.detach().clone(), 0.0
    pruning.multipliers.zero_()
    pruning.observe()
    moved = (before - values.detach())[pruning.units :]
    wanted = torch.tensor(expected) * slope[pruning.units :]
    assert wanted.abs().max() > 0
    torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("masks", ["scored", "movement", "l0"])
@pytest.mark.parametrize("cost", ["parameters", "macs", "bytes"])
def test_targets_of_the_whole_model_are_met_on_a_schedule(tiny, tmp_path, masks, cost):
    model = tiny("bert")
    before = {"macs": count_macs(model, 8), "parameters": count_parameters(model)}
    target = {"sparsity": None, "target": {cost: "0.9x"}, "sequence_length": 8}
    callback = PruneCallback(recipe(masks=masks, **target))
    job = trainer(model, tmp_path, callback, save_strategy="no")
    job.train()
    after = {"macs": count_macs(model, 8), "parameters": count_parameters(model)}
    name = "parameters" if cost == "bytes" else cost
    assert callback.selection.met
    assert 0.8 * before[name] < after[name] <= 0.9 * before[name]
    logged = [e["prune/sparsity"] for e in job.state.log_history if "prune/sparsity" in e]
    assert logged[-1] >= 0.1


def test_why_a_speedup_of_a_schedule_is_missed(tiny, tmp_path, monkeypatch, caplog):
    """A clock that no width moves: floors are not to blame."""
    model = tiny("bert")
    points = {latency_table._group(site): {1: 0, site.units: 300} for site in find_sites(model)}
    table = latency_table.LatencyTable(2000, 800, points)
    monkeypatch.setattr(targets, "latency_table", lambda *_, **__: table)
    monkeypatch.setattr(Chooser, "_measure", lambda self, counts: 0.95)
    target = {"sparsity": None, "target": {"speedup": "1.2x"}, "sequence_length": 8}
    trainer(model, tmp_path, PruneCallback(recipe(**target)), save_strategy="no").train()
    assert "of the widths that were timed none came within 5%" in caplog.text
    assert "floors" not in caplog.text


@pytest.mark.parametrize("masks", ["scored", "l0"])
def test_a_speedup_is_asked_of_a_schedule_and_timed_at_its_end(tiny, tmp_path, masks, monkeypatch):
    """The table says how fast each width is; the last widths are timed, and chosen again."""
    model = tiny("bert")
    sites = find_sites(model)
    groups = {latency_table._group(site): site for site in sites}
    points = {name: {1: 0, site.units: 300} for name, site in groups.items()}
    table = latency_table.LatencyTable(2000, 800, points)
    monkeypatch.setattr(targets, "latency_table", lambda *_, **__: table)
    timed = []

    def measure(self, counts):
        """What the table says, and a tenth more: so it was wrong."""
        assert not callback.pruning.gates.values, "a closed gate does not fit other widths"
        timed.append(counts)
        return 1.1 * table.predict_ns(sites, counts) / table.total_ns

    monkeypatch.setattr(Chooser, "_measure", measure)
    target = {"sparsity": None, "target": {"speedup": "1.5x"}, "sequence_length": 8}
    callback = PruneCallback(recipe(masks=masks, **target))
    trainer(model, tmp_path, callback, save_strategy="no").train()
    outcome = callback.selection.outcomes[-1]
    assert outcome.cost == "latency_ns"
    assert outcome.met
    assert 1 < len(timed) <= 4
    kept = {name: len(site.kept) for name, site in callback.plan.sites.items()}
    assert table.predict_ns(sites, kept) <= 2000 / 1.5 / 1.1 * 1.05


def test_regrowth_scores_closed_gates_and_lets_them_come_back(tiny, inputs_for):
    model, batch = still(tiny("bert")), inputs_for("bert")
    found = {}
    for regrow in (False, True):
        pruning = StructuredPruning(stage("scored", schedule={"regrow": regrow}), 0)
        pruning.start(model)
        model(**batch).loss.backward()
        pruning.observe()
        pruning.decide(1.0)
        model.zero_grad()
        model(**batch).loss.backward()
        pruning.observe()
        site = next(s for s in pruning.sites if pruning.selection.plan.sites[s.name].removed)
        closed = list(pruning.selection.plan.sites[site.name].removed)
        found[regrow] = pruning.sums[site.name][closed]
        pruning.gates.remove()
        model.zero_grad()
    assert not found[False].any()
    assert (found[True] > 0).all()


def test_open_gates_score_alike_with_and_without_regrowth(tiny, inputs_for):
    model, batch = still(tiny("llama")), inputs_for("llama")
    sums = []
    for regrow in (False, True):
        pruning = StructuredPruning(stage("scored", schedule={"regrow": regrow}), 0)
        pruning.start(model)
        model(**batch).loss.backward()
        pruning.observe()
        sums.append(pruning.sums)
        pruning.gates.remove()
        model.zero_grad()
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, rtol=1e-4, atol=1e-9)


def test_the_scale_of_a_loss_does_not_matter(tiny, inputs_for):
    """Gradient accumulation, mixed precision and clipping scale a step; its say stays the same."""
    model = still(tiny("bert"))
    sums = []
    for scales in ((1.0, 1.0), (4.0, 0.25)):
        pruning = StructuredPruning(stage("scored"), 0)
        pruning.start(model)
        for seed, scale in enumerate(scales):
            (scale * model(**inputs_for("bert", seed=seed)).loss).backward()
            pruning.observe()
            model.zero_grad()
        sums.append(pruning.sums)
        pruning.gates.remove()
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, rtol=1e-4, atol=1e-9)


def test_half_precision_is_refused_for_learned_masks(tiny, tmp_path):
    job = trainer(tiny("bert"), tmp_path, PruneCallback(recipe(masks="l0")))
    job.args.fp16 = True
    with pytest.raises(ConfigError, match="use bf16"):
        job.train()

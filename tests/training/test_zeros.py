"""Zeros stay zero: every optimizer, accumulation, half precision, checkpoints, adapters."""

import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2ForSequenceClassification, Trainer, TrainingArguments

from hf_prune import KeepZeros, PruneCallback, load_recipe
from hf_prune.errors import (
    ConfigError,
    DataError,
    NumericsError,
    PlanError,
    UnsupportedModelError,
)
from hf_prune.recipe import Prune, Schedule
from hf_prune.training.zeros import WeightPruning, merge_adapter
from hf_prune.weights.find import find_matrices, find_weights
from hf_prune.weights.masks import ZeroWriter, apply_masks_, magnitude_masks


def rows(count=32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (count, 8), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [index % 3 for index in range(count)]})


def train(model, folder, *callbacks, optimizers=(None, None), **options):
    told = {"max_steps": 6, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **told,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )
    trainer.train()
    return trainer


def assert_zero(state, masks):
    assert masks
    for name, mask in masks.items():
        assert not state[name][~mask].any(), name
        assert state[name][mask].any(), name


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
        {"optim": "adafactor"},
        {"optim": "rmsprop"},
        {"optim": "adagrad"},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"max_grad_norm": 0.1, "warmup_steps": 3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_whatever_trains(options, tiny, tmp_path):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model), 0.6)
    before = model.classifier.weight.detach().clone()
    train(model, tmp_path, KeepZeros(masks), **options)
    assert_zero(dict(model.named_parameters()), masks)
    assert not torch.equal(before, model.classifier.weight), "it did train"


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD: gradients are taken at `y`, the model is read at `x`.

    Only a third sequence `z` is kept, from which `eval()` and `train()` compute one from the other.
    """

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "training": False, "steps": 0})
        self.beta = beta

    def _move(self, training, weight):
        for group in self.param_groups:
            for p in group["params"] if group["training"] != training else ():
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    def train(self):
        self._move(True, 1 - self.beta)

    def eval(self):
        self._move(False, 1 - 1 / self.beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["training"]
            share = 1 / (group["steps"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.sub_(p.grad, alpha=group["lr"] * (1 - self.beta * (1 - share)))
                z.sub_(p.grad, alpha=group["lr"])
            group["steps"] += 1


def train_averaging(model, folder, callback):
    optimizer = Averaging(model.parameters())
    return train(
        model,
        folder,
        callback,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        optimizers=(optimizer, None),
    )


def test_an_optimizer_with_weights_of_its_own(tiny, tmp_path):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model), 0.6)
    before = model.classifier.weight.detach().clone()
    trainer = train_averaging(model, tmp_path, KeepZeros(masks))
    for file in sorted(tmp_path.glob("checkpoint-*/model.safetensors")):
        assert_zero(load_file(file), masks)
    assert_zero(dict(model.named_parameters()), masks)
    trainer.optimizer.optimizer.train()
    assert_zero(dict(model.named_parameters()), masks)
    assert not torch.equal(before, model.classifier.weight), "it did train"


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
def test_masks_that_tighten_reach_the_weights_of_the_optimizer(criterion, tiny, tmp_path):
    """At the last evaluation and in the last checkpoint, after masks have closed twice."""
    model = tiny("bert")
    callback = PruneCallback(recipe(criterion=criterion))
    train_averaging(model, tmp_path, callback)
    assert_zero(load_file(tmp_path / "checkpoint-6" / "model.safetensors"), callback.masks)
    assert_zero(dict(model.named_parameters()), callback.masks)


def test_half_precision_weights(tiny, tmp_path):
    model = tiny("bert").to(torch.bfloat16)
    masks = magnitude_masks(find_weights(model), 0.6)
    train(model, tmp_path, KeepZeros(masks))
    assert_zero(dict(model.named_parameters()), masks)


def test_every_checkpoint_and_the_best_one(tiny, tmp_path):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model), 0.6)
    trainer = train(
        model,
        tmp_path,
        KeepZeros(masks),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    files = sorted(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert len(files) >= 2
    for file in files:
        assert_zero(load_file(file), masks)
    assert trainer.state.best_model_checkpoint
    assert_zero(dict(model.named_parameters()), masks)


def recipe(**stage):
    prune = {
        "stage": "prune",
        "units": ["weights"],
        "sparsity": 0.5,
        "schedule": {"kind": "cubic", "start": 0.0, "end": 0.6, "every": 2},
        "ignore": ["classifier.*"],
        **stage,
    }
    return {"stages": [prune, {"stage": "train"}]}


@pytest.mark.parametrize("solver", ["uniform", "global"])
def test_movement(solver, tiny, tmp_path):
    model = tiny("bert")
    callback = PruneCallback(recipe(criterion="movement", solver=solver))
    train(model, tmp_path, callback)
    assert_zero(dict(model.named_parameters()), callback.masks)
    removed = sum(int((~mask).sum()) for mask in callback.masks.values())
    total = sum(mask.numel() for mask in callback.masks.values())
    assert 0 <= removed - 0.5 * total <= len(callback.masks)
    by_size = magnitude_masks(find_weights(tiny("bert"), ["classifier.*"]), 0.5, solver)
    assert any(not torch.equal(by_size[n], m) for n, m in callback.masks.items())


def test_units_that_are_left_without_effect_go_when_training_ends(
    tiny, inputs_for, logits, tmp_path
):
    model, other, batch = tiny("bert"), tiny("bert"), inputs_for("bert")
    data = recipe(criterion="magnitude", ignore=["classifier*"], sparsity=0.97)
    callback = PruneCallback(data)
    train(model, tmp_path, callback)
    (entry,) = callback.entries
    assert (entry["kind"], entry["gradual"]) == ("weights", True)
    assert entry["sparsity"] == pytest.approx(0.97, abs=1e-3)
    gone = sum(len(site.removed) for site in callback.plan.sites.values())
    assert entry["dead_units"] == gone > 0
    assert_zero(dict(model.named_parameters()), callback.masks)
    data["stages"][0]["weights"] = {"remove_dead": False}
    kept = PruneCallback(data)
    train(other, tmp_path, kept)
    assert not kept.plan.sites
    assert kept.entries[0]["dead_units"] == 0
    assert any(p.shape != other.get_parameter(n).shape for n, p in model.named_parameters())
    torch.testing.assert_close(logits(model.eval(), batch), logits(other.eval(), batch))


def test_movement_names_what_does_not_learn(tiny, tmp_path):
    model = tiny("bert")
    for parameter in model.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"encoder.layer.0.*have none: train them, or leave"):
        train(model, tmp_path, PruneCallback(recipe(criterion="movement")))
    ignore = ["classifier*", "*layer.0.*"]
    callback = PruneCallback(recipe(criterion="movement", ignore=ignore))
    train(model, tmp_path, callback)
    assert_zero(dict(model.named_parameters()), callback.masks)


def test_the_zeros_of_a_loaded_model(tiny, tmp_path):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model, ["classifier*"]), 0.6)
    apply_masks_(model, masks)
    model.save_pretrained(tmp_path / "sparse")
    loaded = type(model).from_pretrained(tmp_path / "sparse")
    callback = KeepZeros()
    train(loaded, tmp_path, callback)
    assert callback.masks.keys() == masks.keys()
    assert_zero(dict(loaded.named_parameters()), masks)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_adapters_are_not_pruned(tiny, tmp_path):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model), 0.6)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(UnsupportedModelError, match="merge adapters before you prune"):
        train(tuned, tmp_path, PruneCallback(recipe(criterion="magnitude")))
    with pytest.raises(PlanError, match="leave the masks out, and merge with merge_adapter"):
        KeepZeros(masks).on_train_begin(TrainingArguments(tmp_path), None, None, model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_are_written_whatever_stood_there(dtype):
    model = nn.Linear(40, 30).to(dtype)
    first = {"weight": torch.rand(30, 40) > 0.5}
    write = ZeroWriter()
    for masks in (first, first, {"weight": torch.rand(30, 40) > 0.5}):
        model.weight.data.normal_()
        model.weight.data[~masks["weight"]] = float("nan")
        model.weight.data[0] = -model.weight.data[0].abs()
        before = model.weight.detach().clone()
        write(model, masks)
        assert torch.equal(model.weight[masks["weight"]], before[masks["weight"]])
        gone = model.weight.detach()[~masks["weight"]]
        assert not gone.any()
        assert not gone.signbit().any(), "no negative zeros"


class Plain(nn.Module):
    """No model of transformers: a Trainer asks only for a loss."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.outer = nn.Embedding(99, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.outer(self.inner(self.words(input_ids).mean(1)).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
def test_any_module_that_a_trainer_trains(criterion, tmp_path):
    model = Plain()
    callback = PruneCallback(recipe(criterion=criterion, ignore=["outer*"]))
    train(model, tmp_path, callback)
    assert_zero(dict(model.named_parameters()), callback.masks)
    assert callback.plan.weights == {"inner.weight": 32}


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_and_masks_come_back_in_any_order(tiny, reverse):
    """A file of tensors has no order of its own."""
    stage = Prune(units=("weights",), criterion="movement", sparsity=0.5, schedule=Schedule())
    before, after = WeightPruning(stage), WeightPruning(stage)
    model = tiny("bert")
    before.start(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.tensor([1])).loss.backward()
    before.observe()
    before.decide(0.5)
    data, tensors = before.state()
    assert len(tensors) == 2 * len(before.masks) > 0
    after.start(tiny("bert"))
    after.load(data, dict(sorted(tensors.items(), reverse=reverse)))
    for mine, theirs in ((after.masks, before.masks), (after.sums, before.sums)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def movement(solver="global", values=(3.0, -1.0)):
    """A stage on one matrix, or on one for each row of `values`, `[matrices, entries]`."""
    table = torch.tensor(values)
    table = table if table.ndim == 2 else table[None]
    model = nn.Sequential(*(nn.Linear(table.shape[1], 1, bias=False) for _ in table))
    with torch.no_grad():
        for layer, row in zip(model, table, strict=True):
            layer.weight.copy_(row[None])
    stage = Prune(
        units=("weights",),
        criterion="movement",
        solver=solver,
        sparsity=0.5,
        schedule=Schedule(),
    )
    pruning = WeightPruning(stage)
    pruning.start(model)
    return model, pruning


def step(model, pruning, *gradients):
    for layer, gradient in zip(model, gradients, strict=True):
        layer.weight.grad = torch.tensor([gradient])
    pruning.observe()


def test_an_overflowed_step_does_not_count_as_movement():
    model, pruning = movement(values=[[3.0, -1.0], [2.0, 2.0]])
    step(model, pruning, [float("inf"), 1.0], [1.0, 1.0])
    with pytest.raises(NumericsError, match="not finite in 1 steps: training diverged"):
        pruning.decide(1.0)
    step(model, pruning, [1.0, 1.0], [2.0, -2.0])
    step(model, pruning, [1.0, 1.0], [2.0, float("nan")])
    assert pruning.overflows == 2
    sums = [value.tolist() for value in pruning.sums.values()]
    assert sums == [[[-3.0, 1.0]], [[-4.0, 4.0]]], "not one matrix of such a step counts"
    pruning.decide(1.0)
    assert [mask.tolist() for mask in pruning.masks.values()] == [[[False, True]]] * 2


@pytest.mark.parametrize("solver", ["global", "uniform"])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_small_movements_are_told_apart_beside_large_ones(solver, scale):
    """In float32 `4e-9 - (-1)` is `1`, and so is `1e-9 - (-1)`."""
    model, pruning = movement(solver, [1.0, 1.0, 1.0, 1.0])
    step(model, pruning, [-4e-9 * scale, -2e-9 * scale, -1e-9 * scale, scale])
    pruning.decide(1.0)
    (mask,) = pruning.masks.values()
    assert mask.tolist() == [[True, True, False, False]]


def test_movement_is_the_sum_of_minus_weight_times_gradient():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    stage = Prune(units=("weights",), criterion="movement", sparsity=0.5, schedule=Schedule())
    pruning = WeightPruning(stage)
    pruning.start(model)
    with pytest.raises(DataError, match="before a single optimizer step"):
        pruning.decide(1.0)
    expected = torch.zeros(3, 4)
    for step in range(3):
        weight = model[0].weight
        weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        expected -= weight.detach() * weight.grad
        pruning.observe()
        with torch.no_grad():
            weight -= 0.1 * weight.grad
    pruning.decide(1.0)
    order = expected.flatten().argsort()
    assert not pruning.masks["0.weight"].flatten()[order[:6]].any()
    gone = ~pruning.masks["0.weight"]
    model[0].weight.grad = torch.full((3, 4), -100.0)
    pruning.observe()
    pruning.decide(1.0)
    assert torch.equal(~pruning.masks["0.weight"], gone), "what is gone does not come back"
    copy = WeightPruning(stage)
    copy.start(model)
    copy.load(*pruning.state())
    assert torch.equal(copy.sums["0.weight"], pruning.sums["0.weight"])
    assert torch.equal(copy.masks["0.weight"], pruning.masks["0.weight"])


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
@pytest.mark.parametrize(("name", "pattern"), [("bert", "2:4"), ("gpt2", "1:4"), ("gpt2", "4x2")])
def test_patterns_grow_until_they_are_whole(criterion, name, pattern, tiny, tmp_path):
    model, seen = tiny(name), []
    if name == "gpt2":  # whose matrices are stored the other way round
        model.config.num_labels, model.config.pad_token_id = 3, 0
        model = GPT2ForSequenceClassification(model.config)
    given = {
        "weights": {"pattern": pattern, "remove_dead": False},
        "ignore": ["score*", "classifier*"],
    }
    blocks = "x" in pattern
    callback = PruneCallback(recipe(criterion=criterion, sparsity=0.5 if blocks else None, **given))
    decide = callback.pruning.decide

    def watched(share):
        decide(share)
        seen.append({n: m.clone() for n, m in callback.masks.items()})

    callback.pruning.decide = watched
    train(model, tmp_path, callback)
    assert_zero(dict(model.named_parameters()), callback.masks)
    assert len(seen) > 1
    for before, after in itertools.pairwise(seen):
        for key, mask in after.items():
            assert not (mask & ~before[key]).any(), "zeros never come back"
    first, last = (sum(int((~m).sum()) for m in masks.values()) for masks in (seen[0], seen[-1]))
    assert first < last
    for matrix in find_matrices(model, ignore=given["ignore"]):
        mask = matrix.view(callback.masks[matrix.name])
        if blocks:
            tiles = mask.unflatten(2, (-1, 2)).unflatten(1, (-1, 4)).transpose(2, 3).flatten(3)
            assert torch.equal(tiles.any(-1), tiles.all(-1)), "whole blocks"
            assert (~mask).float().mean() == pytest.approx(0.5, abs=0.02)
        else:
            n, m = map(int, pattern.split(":"))
            assert (mask.unflatten(2, (-1, m)).sum(-1) == n).all(), matrix.name


def test_what_cannot_grow_is_refused():
    told = recipe(criterion="magnitude", weights={"pattern": "4x4"}, solver="global")
    with pytest.raises(ConfigError, match="grows with a schedule in every matrix alike"):
        PruneCallback(told)
    with pytest.raises(ConfigError, match="criterion 'admm' is not for single weights while"):
        PruneCallback(recipe(criterion="admm"))


def test_the_default_criterion_is_one_that_training_has():
    found = load_recipe(recipe())
    assert found.prune_stages[0].criterion == "magnitude"
    assert load_recipe(found.model_dump(mode="json")) == found
    PruneCallback(found)
    one_shot = {"stage": "prune", "units": ["weights"], "sparsity": 0.5}
    assert load_recipe({"stages": [one_shot]}).prune_stages[0].criterion == "admm"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("given", [True, False])
def test_a_merged_adapter_keeps_the_zeros(given, tiny, inputs_for, logits):
    model, batch = tiny("llama"), inputs_for("llama")
    masks = magnitude_masks(find_weights(model), 0.6)
    apply_masks_(model, masks)
    sparse = logits(model, batch)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    merged = merge_adapter(tuned, masks if given else None)
    assert_zero(dict(merged.named_parameters()), masks)
    changed = logits(merged, batch)
    assert not torch.allclose(changed, sparse, atol=1e-3), "the update is in"
    with pytest.raises(ConfigError, match="has no adapter to merge"):
        merge_adapter(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_merged_adapter_keeps_the_zeros_of_modules_that_it_trains_whole(tiny):
    model = tiny("bert")
    masks = magnitude_masks(find_weights(model), 0.6)
    apply_masks_(model, masks)
    told = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    tuned = get_peft_model(model, told)
    before = model.state_dict()["classifier.original_module.weight"].clone()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.3)
    merged = merge_adapter(tuned)
    assert_zero(dict(merged.named_parameters()), masks)
    assert not torch.allclose(before, merged.classifier.weight), "what it trained is in"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_merged_adapter_keeps_the_zeros_of_experts(tiny):
    """Packed experts are parameters: PEFT wraps them once for each, one around the other."""
    model = tiny("mixtral")
    masks = magnitude_masks(find_weights(model), 0.6)
    apply_masks_(model, masks)
    before = model.state_dict()["model.layers.0.mlp.experts.down_proj"].clone()
    packed = ["experts.gate_up_proj", "experts.down_proj"]
    told = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=packed)
    tuned = get_peft_model(model, told)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    merged = merge_adapter(tuned)
    assert_zero(dict(merged.named_parameters()), masks)
    after = merged.state_dict()["model.layers.0.mlp.experts.down_proj"]
    assert not torch.allclose(before, after, atol=1e-3), "the update is in"

"""Two CPU processes: the plan of one process, and the same weights on both."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from words import word_tokenizer

from hf_prune import (
    DistillCallback,
    PruneCallback,
    compress,
    last_checkpoint,
    make_student,
    prepare_trainer,
    sparsify_,
)
from hf_prune.errors import PlanError, UnsupportedModelError
from hf_prune.recipe import Student


def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 99, (64, 8), generator=generator), torch.arange(64) % 2


ONE_SHOT = {"stages": [{"stage": "prune", "sparsity": 0.5, "sequence_length": 16}]}
GRADUAL = {
    "stages": [
        {"stage": "prune", "criterion": "taylor", "sparsity": 0.5, "schedule": {"every": 2}},
        {"stage": "train"},
    ]
}
CALIBRATED = {
    "stages": [
        {"stage": "prune", "sparsity": 0.5, "schedule": {"every": 2, "end": 0.8}},
        {"stage": "train"},
    ]
}
"""The step of one shot, several times."""
WEIGHTS = {
    "admm": {"criterion": "admm"},
    "admm, knapsack": {"criterion": "admm", "solver": "knapsack"},
    "admm, outliers": {"criterion": "admm", "solver": "outliers"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "wanda by norms": {
        "criterion": "wanda",
        "reconstruct": False,
        "weights": {"dense_target": False},
    },
    "fisher_diagonal": {"criterion": "fisher_diagonal", "solver": "global"},
    "polish": {"criterion": "wanda", "polish_steps": 3},
    "in one budget with units": {
        "units": ["heads", "neurons", "weights"],
        "weights": {"criterion": "wanda"},
        "search_trials": 3,
    },
}
"""Every way by which single weights read data."""


def zeros(trained):
    """Where a network is zero, as one string of bits."""
    matrices = [p.detach().flatten() == 0 for p in trained.parameters() if p.ndim == 2]
    return "".join(str(int(bit)) for bit in torch.cat(matrices))


def single_weights(mine):
    """By method, the zeros and the sum of weights of a network with half of its weights gone."""
    figures = {}
    for name, fields in WEIGHTS.items():
        stage = {"stage": "prune", "units": ["weights"], "sparsity": 0.5, **fields}
        stage["sequence_length"] = 16
        found = compress(model(), {"stages": [stage]}, mine).model
        figures[name] = {"zeros": zeros(found), "sum": checksum(found)}
    return figures


STRUCTURE = {
    "hidden": {"units": ["hidden"], "criterion": "fisher", "sparsity": 0.5},
    "search": {"sparsity": 0.5, "search_trials": 3, "round_to": 4},
    "sampled": {"sparsity": 0.5, "criterion": "kfac_obs_sampled", "polish_steps": 2},
    "timed": {"target": {"speedup": 1.3, "batch_size": 2}},
    "fewer": {"sparsity": 0.5, "calibration_samples": 32, "reconstruction_samples": 48},
}
"""Ways to decide on units that a plain sparsity does not go."""


def units(mine):
    """By stage, the plan and the sum of weights after it, and how much data it took."""
    figures = {}
    for name, fields in STRUCTURE.items():
        found = compress(
            model(), {"stages": [{"stage": "prune", "sequence_length": 16, **fields}]}, mine
        )
        samples = found.report["calibration_samples"]
        figures[name] = [found.plan.fingerprint(), checksum(found.model), samples]
    stage = Student(layers=1, hidden=16, heads=2, neurons=24, pick_layers="score")
    student = make_student(model(), stage, mine)
    return figures | {"student": ["", checksum(student), 0]}


def checksum(trained):
    return float(sum(p.detach().double().abs().sum() for p in trained.parameters()))


def gradually(folder, recipe, calibration=None):
    """The plan of a training that prunes, and the sum of the weights in the end."""
    callback, student = PruneCallback(recipe, calibration=calibration), model()
    ids, labels = data()
    arguments = TrainingArguments(
        f"{folder}/trainer",
        per_device_train_batch_size=16 // PartialState().num_processes,
        max_steps=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    Trainer(student, arguments, train_dataset=rows, callbacks=[callback]).train()
    return [callback.plan.fingerprint(), checksum(student)]


class Branches(torch.nn.Module):
    """One of two layers, by the data."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        return self.layers[int(x.mean() > 0)](x)


def refused():
    """What is said where the data of one process never runs a layer: on all, and none waits."""
    state, said = PartialState(), []
    batches = [torch.ones(8, 4), -torch.ones(8, 4)][: 2 - state.process_index]
    for solver in ("uniform", "knapsack"):
        try:
            sparsify_(Branches(), batches, sparsity=0.5, solver=solver)
        except UnsupportedModelError as error:
            said.append(str(error))
    return said


def job(folder):
    """What each process does; the figures go to a file of its own."""
    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    ids, _ = data()
    mine = [{"input_ids": ids[i : i + 8]} for i in range(0, 64, 8)][rank::world]
    shot = compress(model(), ONE_SHOT, mine)
    figures = {
        "world": world,
        "one_shot": [shot.plan.fingerprint(), checksum(shot.model)],
        "gradual": gradually(folder, GRADUAL),
        "calibrated": gradually(folder, CALIBRATED, mine),
        "weights": single_weights(mine),
        "units": units(mine),
        "refused": refused(),
    }
    (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(figures))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="debug_launcher forks")
def test_two_processes_agree_with_one(tmp_path):
    debug_launcher(job, args=(str(tmp_path),), num_processes=2)
    debug_launcher(job, args=(str(tmp_path),), num_processes=1)
    first, second, alone = (
        json.loads((tmp_path / name).read_text()) for name in ("2-0.json", "2-1.json", "1-0.json")
    )
    assert first["world"] == second["world"] == 2
    for name, here in first["weights"].items():
        assert here == second["weights"][name], f"{name}: the same zeros and weights on both ranks"
    assert [text[:32] for text in first["refused"]] == ["calibration never ran layers.0: "] * 2
    assert alone["refused"] == []
    assert first == second, "both ranks have the same plans and the same weights"
    for name in ("one_shot", "gradual", "calibrated"):
        assert first[name][0] == alone[name][0], name
        assert first[name][1] == pytest.approx(alone[name][1], rel=1e-3), name
    for name, (plan, total, samples) in first["units"].items():
        if name != "timed":
            assert [plan, samples] == [alone["units"][name][0], alone["units"][name][2]], name
            assert total == pytest.approx(alone["units"][name][1], rel=1e-4), name
    for name, here in first["weights"].items():
        there = alone["weights"][name]
        pairs = list(zip(here["zeros"], there["zeros"], strict=True))
        assert sum(a == b for a, b in pairs) / len(pairs) > AGREEMENT, name
        assert here["sum"] == pytest.approx(there["sum"], rel=1e-2), name


LEARNED = {
    "stages": [
        {
            "stage": "prune",
            "criterion": "taylor",
            "solver": "global",
            "sparsity": 0.5,
            "masks": "l0",
            "schedule": {"every": 1, "kind": "linear", "end": 0.8},
        },
        {"stage": "train"},
    ]
}
WIDTH = {
    "stages": [
        {**LEARNED["stages"][0], "coarse": ["hidden"], "mask_learning_rate": 0.3},
        {"stage": "train"},
    ]
}
REGROW = {
    "stages": [
        {**GRADUAL["stages"][0], "schedule": {"every": 2, "regrow": True}},
        {"stage": "train"},
    ]
}


AGREEMENT = 0.99
"""Of zeros with one process and with two: sums of another order decide near ties otherwise."""


class Stop(TrainerCallback):
    """Breaks off on all processes at once, as a killed job is."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise InterruptedError


def teach(folder, name, recipe, *more, resume=None):
    """One training with pruning and a teacher; what it ended with."""
    world = PartialState().num_processes
    ids, labels = data()
    student, teacher = model(), model()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    pruning = PruneCallback(recipe)
    teaching = DistillCallback(teacher, alpha=0.5, hidden=0.5, relations=1.0, layers="ordered")
    arguments = TrainingArguments(
        f"{folder}/{name}-{world}",
        per_device_train_batch_size=16 // world,
        max_steps=8,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    callbacks = [pruning, teaching, *more]
    trainer = Trainer(student, arguments, train_dataset=rows, callbacks=callbacks)
    prepare_trainer(trainer).train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"plan": pruning.plan.fingerprint(), "weights": checksum(student), "losses": losses}


def learned_job(folder):
    """What each process does; the figures go to a file of its own."""
    state = PartialState(cpu=True)
    found = {"world": state.num_processes}
    found["learned"] = teach(folder, "learned", LEARNED)
    found["width"] = teach(folder, "width", WIDTH)
    found["regrow"] = teach(folder, "regrow", REGROW)
    with contextlib.suppress(InterruptedError):
        teach(folder, "killed", LEARNED, Stop())
    state.wait_for_everyone()
    checkpoint = last_checkpoint(f"{folder}/killed-{state.num_processes}")
    found["checkpoint"] = checkpoint.rpartition("-")[2]
    found["resumed"] = teach(folder, "killed", LEARNED, resume=checkpoint)
    path = Path(folder) / f"learned-{state.num_processes}-{state.process_index}.json"
    path.write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="debug_launcher forks")
def test_learning_resuming_and_losses_on_two_processes(tmp_path):
    debug_launcher(learned_job, args=(str(tmp_path),), num_processes=2)
    debug_launcher(learned_job, args=(str(tmp_path),), num_processes=1)
    names = ("learned-2-0", "learned-2-1", "learned-1-0")
    first, second, alone = (json.loads((tmp_path / f"{n}.json").read_text()) for n in names)
    assert first["world"] == second["world"] == 2
    assert alone["world"] == 1
    assert first == second, "both ranks have the same plans, weights and losses"
    assert first["checkpoint"] == "4"
    for found in (first, alone):
        assert found["resumed"]["plan"] == found["learned"]["plan"]
        assert found["resumed"]["weights"] == found["learned"]["weights"], "bit by bit"
    for name in ("learned", "width", "regrow"):
        assert first[name]["plan"] == alone[name]["plan"]
        assert first[name]["losses"] == pytest.approx(alone[name]["losses"], rel=1e-2)


TIMED = {
    "stages": [
        {
            **{k: v for k, v in GRADUAL["stages"][0].items() if k != "sparsity"},
            "target": {"speedup": 1.3, "macs": "0.8x"},
            "sequence_length": 8,
            "solver": "global",
        },
        {"stage": "train"},
    ]
}


def timed_job(folder):
    """What each process does: no two of them measure the same times."""
    state = PartialState(cpu=True)
    os.environ["HF_PRUNE_CACHE"] = f"{folder}/cache-{state.process_index}"
    found = teach(folder, "timed", TIMED)
    tables = len(list(Path(folder).glob("cache-*/latency/*.json")))
    path = Path(folder) / f"timed-{state.process_index}.json"
    state.wait_for_everyone()
    path.write_text(json.dumps({**found, "tables": tables}))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="debug_launcher forks")
def test_times_of_the_main_process_decide_on_all(tmp_path):
    debug_launcher(timed_job, args=(str(tmp_path),), num_processes=2)
    first, second = (json.loads((tmp_path / f"timed-{i}.json").read_text()) for i in range(2))
    assert first == second
    assert first["tables"] == 1


def vocabulary_job(folder):
    """What each process does: the same texts, and then texts of its own."""
    state = PartialState(cpu=True)
    recipe = {"stages": [{"stage": "vocabulary"}]}
    tokenizer = word_tokenizer(["good", "bad", "film"])
    same = compress(model(), recipe, tokenizer=tokenizer, texts=["good film"])
    found = {"tokens": len(same.tokenizer), "told": None}
    try:
        own = [["good film"], ["bad film"]][state.process_index]
        compress(model(), recipe, tokenizer=tokenizer, texts=own)
    except PlanError as error:
        found["told"] = str(error)
    (Path(folder) / f"vocabulary-{state.process_index}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="debug_launcher forks")
def test_the_same_tokens_on_all(tmp_path):
    debug_launcher(vocabulary_job, args=(str(tmp_path),), num_processes=2)
    for index in range(2):
        found = json.loads((tmp_path / f"vocabulary-{index}.json").read_text())
        assert found["tokens"] == 7
        assert found["told"] == "processes keep other tokens: pass the same texts to all of them."

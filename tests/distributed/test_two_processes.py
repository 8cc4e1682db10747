"""Two CPU processes: the plan of one process, and the same weights on both."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_prune import PruneCallback, compress


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


def checksum(trained):
    return float(sum(p.detach().double().abs().sum() for p in trained.parameters()))


def job(folder):
    """What each process does; the figures go to a file of its own."""
    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    ids, labels = data()
    mine = [{"input_ids": ids[i : i + 8]} for i in range(0, 64, 8)][rank::world]
    shot = compress(model(), ONE_SHOT, mine)
    callback = PruneCallback(GRADUAL)
    student = model()
    arguments = TrainingArguments(
        f"{folder}/trainer",
        per_device_train_batch_size=16 // world,
        max_steps=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    Trainer(student, arguments, train_dataset=rows, callbacks=[callback]).train()
    figures = {
        "world": world,
        "one_shot": shot.plan.fingerprint(),
        "one_shot_weights": checksum(shot.model),
        "gradual": callback.plan.fingerprint(),
        "gradual_weights": checksum(student),
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
    assert first == second, "both ranks have the same plans and the same weights"
    for name in ("one_shot", "gradual"):
        assert first[name] == alone[name]
    assert first["one_shot_weights"] == pytest.approx(alone["one_shot_weights"], rel=1e-4)

"""Counts: distinct storages, multiply-accumulates, bytes."""

import pytest
import torch
from tinies import CORE
from torch import nn

from hf_prune.errors import ConfigError
from hf_prune.measure.counts import (
    count_bytes,
    count_encoder_parameters,
    count_macs,
    count_nonzero,
    count_parameters,
    example_batch,
)
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units

families = pytest.mark.parametrize("name", CORE)


def storages(model):
    return {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}


@families
@pytest.mark.parametrize("prune", [False, True])
def test_parameters_are_those_of_distinct_storages(name, prune, tiny, uneven_plan):
    model = tiny(name)
    if prune:
        remove_units(model, uneven_plan(model))
    assert count_parameters(model) == sum(storages(model).values())
    assert count_nonzero(model) == sum(int((p != 0).sum()) for p in model.parameters())


def test_tied_once(tiny):
    model = tiny("gpt2")
    listed = sum(p.numel() for p in model.state_dict().values())
    assert listed - count_parameters(model) == 99 * 32


def test_shared_storage_that_is_not_a_shared_parameter():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert count_parameters(model) == 32
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert count_parameters(model) == 16


def test_parts_of_one_storage_are_all_counted():
    whole = torch.zeros(10)
    model = nn.ParameterList([nn.Parameter(whole[:4]), nn.Parameter(whole[4:])])
    assert count_parameters(model) == 10


def test_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert count_parameters(model) == 40


def test_nonzero_of_tied_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    assert count_nonzero(model) == 3


def test_encoder_by_hand(tiny):
    layer = 4 * (32 * 32 + 32) + (32 * 48 + 48) + (48 * 32 + 32) + 2 * 2 * 32
    assert count_encoder_parameters(tiny("bert")) == 2 * layer


@families
@pytest.mark.parametrize("tokens", [1, 16])
def test_macs_of_the_layers_by_hand(name, tokens, tiny):
    """The sites' formula and what is outside of them explain all that a real forward pass does."""
    model = tiny(name)
    sites = find_sites(model)
    inside = sum(
        s.units * (tokens * s.macs_per_token + 2 * tokens**2 * s.attention_width) for s in sites
    )
    outside = {
        "bert": 32 * 32 + 32 * 3,  # pooler and classifier see the first token
        "roberta": 32 * 32 + 32 * 3,
        "electra": tokens * 16 * 32 + 32 * 32 + 32 * 3,
        "distilbert": 32 * 32 + 32 * 3,
        "gpt2": tokens * 32 * 99,
        "llama": tokens * 32 * 99,
    }[name]
    assert count_macs(model, tokens) == inside + outside


def test_counting_leaves_the_model_alone(tiny):
    model = tiny("bert").train()
    count_macs(model, 8)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_example_batch_is_of_real_tokens(tiny):
    batch = example_batch(tiny("bert"), 3, 11)
    assert batch["input_ids"].shape == (3, 11)
    assert batch["attention_mask"].all()
    assert batch["input_ids"].min() >= 5
    assert batch["input_ids"].max() < 99


def test_bytes(tiny, uneven_plan):
    model = tiny("gpt2")
    before = count_bytes(model)
    exact = 4 * count_parameters(model)
    assert before == exact, "nothing twice"
    dense = count_parameters(model)
    remove_units(model, uneven_plan(model))
    gone = 4 * (dense - count_parameters(model))
    assert before - count_bytes(model) == gone


def test_more_tokens_than_positions_are_refused(tiny):
    most = tiny("bert").config.max_position_embeddings
    with pytest.raises(
        ConfigError, match=rf"sequence_length={most + 1} is more than the {most} pos"
    ):
        example_batch(tiny("bert"), 1, most + 1)
    assert example_batch(tiny("bert"), 1, most)["input_ids"].shape == (1, most)
    with pytest.raises(ConfigError, match="sequence_length=41 is more than the 40 positions"):
        example_batch(tiny("whisper"), 1, 41)
    rotary = tiny("llama")
    length = rotary.config.max_position_embeddings + 1
    assert example_batch(rotary, 1, length)["input_ids"].shape == (1, length)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_bytes_are_those_of_the_files_without_their_headers(name, tiny, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    assert count_bytes(model) == len(data) - 8 - int.from_bytes(data[:8], "little")

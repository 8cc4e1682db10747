"""Bitmask storage: exact round trips, smaller files, and damaged parts refused."""

import functools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.quantizers import auto

from hf_prune import save_model, verify
from hf_prune.checkpoint.bitmask import MASK, VALUES, pack, register_bitmask, unpack
from hf_prune.errors import CheckpointError
from hf_prune.surgery.description import PACKED, QUANT_METHOD
from hf_prune.surgery.remove import remove_units
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks

register_bitmask()
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(TYPES),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_round_trip_is_exact(seed, shape, dtype, sparsity):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    weight.flatten()[0] = -0.0
    values, mask = pack(weight)
    found = unpack(values, mask, tuple(shape))
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8)), "even -0.0"
    assert values.numel() == int((weight != 0).sum()) + 1


def sparse(tiny, name, sparsity=0.7):
    model = tiny(name)
    apply_masks_(model, magnitude_masks(find_weights(model), sparsity))
    return model


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("bert", 0.8),
        ("gpt2", 0.8),
        ("llama", 0.8),
        ("t5", 0.8),
        ("mixtral", 0.8),
        ("qwen3_moe", 0.8),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_plain_from_pretrained_reads_it(name, share, shards, tiny, tmp_path, monkeypatch):
    model = sparse(tiny, name)
    if shards:
        save = functools.partial(type(model).save_pretrained, model, max_shard_size="40KB")
        monkeypatch.setattr(model, "save_pretrained", save)
    sizes = save_model(model, tmp_path / "out", storage="bitmask")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == shards
    assert sum(file.stat().st_size for file in files) == sizes["bytes_stored"]
    assert sizes["bytes_stored"] < share * sizes["bytes_dense"]
    assert verify(tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in info if key.endswith("_keys"))
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "whisper"])
def test_convolutions(name, tiny, tmp_path):
    model = sparse(tiny, name)
    save_model(model, tmp_path / "out", storage="bitmask")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        packed = {key.removesuffix(f".{MASK}") for key in file.keys() if key.endswith(MASK)}  # noqa: SIM118  # no dict
    convolutions = {key for key, value in model.state_dict().items() if value.ndim > 2}
    assert packed & convolutions
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in info if key.endswith("_keys"))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_narrowed_and_sparse(tiny, uneven_plan, inputs_for, logits, tmp_path):
    model = tiny("bert")
    remove_units(model, uneven_plan(model))
    apply_masks_(model, magnitude_masks(find_weights(model), 0.8))
    save_model(model, tmp_path / "out", storage="bitmask")
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, inputs_for("bert")), logits(model, inputs_for("bert")))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision(stored, tiny, tmp_path):
    model = sparse(tiny, "llama").to(stored)
    save_model(model, tmp_path / "out", storage="bitmask")
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=stored)
    for key, value in loaded.state_dict().items():
        assert value.dtype == stored
        assert torch.equal(value, model.state_dict()[key]), key
    wide = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32)
    for key, value in wide.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].float()), key


def test_a_dense_model_stays_as_it_is(tiny, tmp_path):
    model = tiny("bert")
    sizes = save_model(model, tmp_path / "out", storage="bitmask")
    assert sizes["bytes_stored"] == sizes["bytes_dense"]
    assert not hasattr(model.config, "quantization_config")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not any(VALUES in key for key in file.keys())  # noqa: SIM118  # no dict


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_without_the_loader_it_fails(name, tiny, tmp_path, monkeypatch):
    model = sparse(tiny, name)
    save_model(model, tmp_path / "out", storage="bitmask")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, QUANT_METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "out")


def test_the_base_of_a_task_model(tiny, tmp_path):
    model = sparse(tiny, "bert")
    save_model(model, tmp_path / "out", storage="bitmask")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    for key, value in loaded.state_dict().items():
        if "pooler" not in key:
            assert torch.equal(value, model.bert.state_dict()[key]), key
    assert PACKED not in loaded.config.quantization_config
    task = type(model).from_pretrained(tmp_path / "out")
    task.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense")
    assert all(torch.equal(v, task.state_dict()[k]) for k, v in again.state_dict().items())


def damaged(tiny, folder, change):
    model = sparse(tiny, "bert")
    save_model(model, folder, storage="bitmask")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(MASK)).removesuffix(f".{MASK}")
    change(tensors, key)
    save_file(tensors, path, {"format": "pt"})
    return type(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, k: t.update({f"{k}.{MASK}": t[f"{k}.{MASK}"][:-1].clone()}),
        lambda t, k: t.update({f"{k}.{MASK}": t[f"{k}.{MASK}"] | 1}),
        lambda t, k: t.update({f"{k}.{VALUES}": t[f"{k}.{VALUES}"][:-1].clone()}),
        lambda t, k: t.pop(f"{k}.{MASK}"),
    ],
    ids=["short mask", "other bits", "a value less", "no mask"],
)
def test_damaged_parts_never_load(change, tiny, tmp_path):
    model_class = damaged(tiny, tmp_path / "out", change)
    with pytest.raises((RuntimeError, CheckpointError)):
        model_class.from_pretrained(tmp_path / "out")


def test_parts_that_do_not_fit_are_named():
    values, mask = pack(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    with pytest.raises(CheckpointError, match=r"w: its mask has shape \[1\].* needs 2 bytes"):
        unpack(values, mask, (3, 3), "w")
    with pytest.raises(CheckpointError, match=r"w: its mask keeps 2 entries, and \[1\] values"):
        unpack(values[:1], mask, (2, 2), "w")
    with pytest.raises(CheckpointError, match="its mask keeps 2 entries"):
        unpack(values.int(), mask, (2, 2), "w")
    assert np.unpackbits(mask.numpy())[:4].tolist() == [1, 0, 0, 1]


def test_standalone_needs_dense_storage(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="a standalone model needs storage='dense'"):
        save_model(tiny("bert"), tmp_path / "out", standalone=True, storage="bitmask")
    assert not (tmp_path / "out").exists()


def test_the_config_names_the_loader(tiny, tmp_path):
    save_model(sparse(tiny, "bert"), tmp_path / "out", storage="bitmask")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hf_prune"

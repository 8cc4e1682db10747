"""From disk to disk, layer by layer: the same weights as in memory, whole or not at all."""

import contextlib
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from words import word_tokenizer

from hf_prune import ondisk, remove_units, save_model, verify
from hf_prune.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_prune.ondisk import prune_folder
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune, Recipe
from hf_prune.sites import find_sites
from hf_prune.weights import prune as room
from hf_prune.weights.stage import prune_stage_
from hf_prune_cli import main


def stage(**fields):
    told = {
        "sparsity": 0.5,
        "ignore": ("lm_head*", "embed_out*", "*classifier*", "*pooler*"),
        **fields,
    }
    return Prune(units=("weights",), min_calibration_samples=1, **told)


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder


TAKEN = ("llama", "gpt2", "opt", "qwen3", "gemma2", "mistral", "mpnet", "deberta-v2")
"""Of both ways in which layers give hidden states: alone, and first of several things."""


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_the_same_as_in_memory(name, shards, tiny, inputs_for, tmp_path):
    model, batches = tiny(name), [inputs_for(name, seed) for seed in range(2)]
    told = stage(criterion="wanda", reconstruct=False)
    source = saved(model, tmp_path / "dense", max_shard_size=shards)
    figures = prune_folder(source, tmp_path / "out", told, batches)
    prune_stage_(model, told, batches, 0)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in info if key.endswith("_keys"))
    for (key, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3, msg=key)
        assert torch.equal(theirs == 0, ours == 0), key
    assert figures["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert verify(tmp_path / "out")


def test_types_on_disk_stay(tiny, inputs_for, tmp_path):
    source = saved(tiny("llama").to(torch.bfloat16), tmp_path / "dense")
    prune_folder(source, tmp_path / "out", stage(), [inputs_for("llama")])
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 3, "two layers and the rest"
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_what_is_left_outside_of_layers_is_named(tiny, inputs_for, tmp_path):
    source = saved(tiny("llama"), tmp_path / "dense")
    told = (source, tmp_path / "out", stage(ignore=()), [inputs_for("llama")])
    assert prune_folder(*told)["left_dense"] == ["lm_head.weight"]


def test_an_interrupted_run_goes_on(tiny, inputs_for, tmp_path, monkeypatch):
    model, batches = tiny("llama"), [inputs_for("llama")]
    source = saved(model, tmp_path / "dense")
    prune_folder(source, tmp_path / "whole", stage(), batches)
    real, done = room.prune_block, []

    def dies(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(room, "prune_block", dies)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", stage(), batches, progress=tmp_path / "state")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(room, "prune_block", real)
    told = {"progress": tmp_path / "state"}
    figures = prune_folder(source, tmp_path / "out", stage(), batches, **told)
    assert figures["resumed"] == ["model.layers.0"]
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        ours, theirs = load_file(tmp_path / "out" / file.name), load_file(file)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4, msg=key)
    other = saved(tiny("llama"), tmp_path / "other" / "dense")
    for folder, how, data in (
        (source, {"sparsity": 0.6}, batches),
        (source, {}, [inputs_for("llama", 1)]),
        (other, {}, batches),
    ):
        with pytest.raises(CheckpointError, match="from a run with another model, recipe or data"):
            prune_folder(folder, tmp_path / "new", stage(**how), data, **told)


def test_one_layer_at_a_time(tiny, inputs_for, tmp_path, monkeypatch):
    """While a layer is pruned, no other layer has memory."""
    source = saved(tiny("llama"), tmp_path / "dense")
    walk, seen = room.prune_layers, []

    def watches(model, layers, matrices, streams, job, around):
        def inner(name):
            seen.append(name)
            with around(name):
                real = [n for n, p in model.named_parameters() if not p.is_meta]
                real_layers = {n.split(".")[2] for n in real if ".layers." in n}
                assert real_layers == {name.split(".")[2]}
                yield

        walk(model, layers, matrices, streams, job, contextlib.contextmanager(inner))

    monkeypatch.setattr(ondisk, "prune_layers", watches)
    prune_folder(source, tmp_path / "out", stage(), [inputs_for("llama")])
    assert seen == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "knapsack"}, "with solver: uniform"),
        ({"criterion": "sensitivity"}, "needs no gradient"),
        ({"polish_steps": 5}, "polish_steps: not from disk to disk"),
        ({"weights": {"embeddings": True}}, "weights.embeddings: not from disk to disk"),
        ({"weights": {"remove_dead": True}}, "weights.remove_dead: not from disk to disk"),
        (
            {"weights": {"targets": ("lm_head*",)}, "ignore": ()},
            "nothing outside of layers is pruned: lm_head",
        ),
    ],
)
def test_what_needs_the_whole_model(fields, message, tiny, inputs_for, tmp_path):
    source = saved(tiny("llama"), tmp_path / "dense")
    with pytest.raises(ConfigError, match=message):
        prune_folder(source, tmp_path / "out", stage(**fields), [inputs_for("llama")])
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_whole(tiny, inputs_for, tmp_path):
    source = saved(tiny("llama"), tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj"):
        prune_folder(source, tmp_path / "out", stage(), [inputs_for("llama")])
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        prune_folder(source, tmp_path / "out", stage(), [inputs_for("llama")])
    (source / ondisk.INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        prune_folder(source, tmp_path / "out", stage(), [inputs_for("llama")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "a decoder reads what an encoder gave"),
        ("albert", "each once and in one chain"),
        ("clip", "each once and in one chain"),
    ],
)
def test_models_that_are_not_a_chain_of_layers(name, message, tiny, inputs_for, tmp_path):
    """Layers that run again, or in towers, would be pruned from what they never see."""
    source = saved(tiny(name), tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=message):
        prune_folder(source, tmp_path / "out", stage(), [inputs_for(name)])
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_model_is_told_as_it_is(tiny, inputs_for, tmp_path):
    source, batch = saved(tiny("gpt2"), tmp_path / "dense"), inputs_for("gpt2")
    batch["position_ids"] = torch.full_like(batch["input_ids"], 999)
    with pytest.raises(IndexError, match="index out of range"):
        prune_folder(source, tmp_path / "out", stage(), [batch])


def test_what_hf_prune_saved(tiny, inputs_for, tmp_path):
    """Bits and other shapes are refused with the way out, which works."""
    bits, dense, small = (tmp_path / name for name in ("bits", "dense", "small"))
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[:40] = 0
    save_model(model, bits, storage="bitmask")
    told = stage(), [inputs_for("llama")]
    with pytest.raises(UnsupportedModelError, match="is stored as a bitmask: load the model, and"):
        prune_folder(bits, tmp_path / "out", *told)
    save_model(AutoModelForCausalLM.from_pretrained(bits), dense)
    assert prune_folder(dense, tmp_path / "out", *told)["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    site = find_sites(model)[0]
    remove_units(model, Plan("llama", {site.name: SitePlan(site.kind, site.units, (0,))}))
    save_model(model, small)
    with pytest.raises(UnsupportedModelError, match="has lost units"):
        prune_folder(small, tmp_path / "other", *told)


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_names_that_differ_on_disk(name, tiny, inputs_for, tmp_path):
    """The checkpoint is whole: what it needs is another way, and the error says which."""
    source = saved(tiny(name), tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="under other names than the model has"):
        prune_folder(source, tmp_path / "out", stage(), [inputs_for(name)])


def test_the_command(tiny, tmp_path):
    """A recipe and a text; what is cut from it calibrates."""
    source = saved(tiny("llama"), tmp_path / "dense")
    words = [f"w{index}" for index in range(90)]
    word_tokenizer(words).save_pretrained(source)
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text(" ".join(words * 3), encoding="utf-8")
    wanted = Recipe(stages=(stage(),)).to_yaml()
    recipe.write_text(wanted, encoding="utf-8")
    arguments = ["prune-folder", *map(str, (source, tmp_path / "out", recipe, text))]
    result = CliRunner().invoke(main, [*arguments, "--max-length", "16"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["sparsity"] == pytest.approx(0.5, abs=0.01)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert float((loaded.model.layers[1].mlp.up_proj.weight == 0).float().mean()) == 0.5
    result = CliRunner().invoke(main, [*arguments, "--max-length", "900", "--overwrite"])
    assert result.exit_code == 1
    assert "tokens, less than one sequence of 900" in result.output

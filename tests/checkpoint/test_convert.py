"""Folders in the layouts of older tools, made here, and converted with equal logits."""

import json
import pickle

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tinies import auto_class
from torch.nn.utils import prune

from hf_prune.checkpoint.convert import convert, read_old, read_weights
from hf_prune.checkpoint.manifest import verify
from hf_prune.errors import CheckpointError, OutputExistsError
from hf_prune.measure.counts import count_parameters
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites, logical_weight, projection
from hf_prune.surgery.remove import remove_units
from hf_prune_cli import main

ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
}


def write_old(folder, state, config, *, pickled=True):
    """As transformers 4 did: a pickle of tensors, and a config without our description."""
    folder.mkdir()
    data = {**config.to_dict(), "architectures": [ARCHITECTURES[config.model_type]]}
    for key in ("quantization_config", "per_layer_config"):
        data.pop(key, None)
    (folder / "config.json").write_text(json.dumps(data))
    state = {name: value.contiguous().clone() for name, value in state.items()}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")  # noqa: TID251
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def heads_plan(model):
    """Head 1 of layer 0 goes, and heads 0 and 3 of layer 1."""
    sites = find_sites(model, ["heads"])
    return Plan(
        model.config.model_type,
        {
            sites[0].name: SitePlan("heads", 4, (0, 2, 3)),
            sites[1].name: SitePlan("heads", 4, (1, 2)),
        },
    )


def check(name, folder, expected, batch, logits, tmp_path):
    result = convert(folder, tmp_path / "new")
    loaded, info = auto_class(name).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-5, rtol=0)
    assert verify(tmp_path / "new")
    return result, loaded


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("pickled", [True, False])
def test_pruned_heads_of_transformers_4(name, pickled, tiny, inputs_for, logits, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    remove_units(model, heads_plan(model))
    expected = logits(model, batch)
    model.config.pruned_heads = {0: [1], 1: [0, 3]}
    folder = write_old(tmp_path / "old", model.state_dict(), model.config, pickled=pickled)
    (folder / "vocab.txt").write_text("[PAD]")
    result, loaded = check(name, folder, expected, batch, logits, tmp_path)
    assert result.found == ["pruned_heads of transformers 4: 3 heads"]
    assert count_parameters(loaded) == count_parameters(model)
    assert not hasattr(loaded.config, "pruned_heads")
    assert (tmp_path / "new" / "vocab.txt").read_text() == "[PAD]"


def narrow_hidden(model, kept):
    """What CoFi does to a BERT: hidden dimensions go everywhere, the head included."""
    state = {}
    for name, value in model.state_dict().items():
        for axis in range(value.ndim):
            inner = ("query", "key", "value", "intermediate.dense")
            is_inner = any(part in name for part in inner) and "output" not in name
            columns = not ("attention.output" in name or name.endswith("output.dense.weight"))
            keep = (axis == 0 and not is_inner) or (axis == 1 and (columns or not is_inner))
            keep = keep and not (axis == 1 and "output.dense" in name)
            keep = keep and not (axis == 0 and ("embeddings." in name and value.ndim == 2))
            keep = keep and not (axis == 0 and name.startswith("classifier"))
            if keep and value.shape[axis] == 32:
                value = value.index_select(axis, kept)
        state[name] = value
    return state


def test_shapes_of_cofi(tiny, inputs_for, logits, tmp_path, uneven_plan):
    """Heads, neurons and hidden width, told by nothing but the shapes of the weights."""
    model, batch = tiny("bert"), inputs_for("bert")
    remove_units(model, uneven_plan(model))
    kept = torch.tensor([i for i in range(32) if i not in (3, 4, 20, 31)])
    state = narrow_hidden(model, kept)
    assert state["bert.embeddings.word_embeddings.weight"].shape == (99, 28)
    assert state["classifier.weight"].shape == (3, 28)
    assert state["bert.pooler.dense.weight"].shape == (28, 28)
    folder = write_old(tmp_path / "old", state, model.config)
    result = convert(folder, tmp_path / "new")
    assert "parameters smaller than the config says" in result.found[0]
    loaded = auto_class("bert").from_pretrained(tmp_path / "new")
    reference = torch_bert(state, batch)
    torch.testing.assert_close(logits(loaded, batch), reference, atol=1e-5, rtol=0)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: v.shape for n, v in state.items()
    }
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state[name]), name
    base = loaded.bert
    base.save_pretrained(tmp_path / "base")
    again = type(base).from_pretrained(tmp_path / "base")
    for ours, theirs in zip(again.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def torch_bert(state, batch):
    """BERT from its weights alone, with no help of transformers."""
    from torch.nn.functional import gelu, layer_norm, linear

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def layer(x, name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    at = "bert.embeddings"
    x = state[f"{at}.word_embeddings.weight"][ids] + state[f"{at}.token_type_embeddings.weight"][0]
    x = norm(x + state[f"{at}.position_embeddings.weight"][: ids.shape[1]], f"{at}.LayerNorm")
    for index in range(2):
        at = f"bert.encoder.layer.{index}"
        q, k, v = (
            layer(x, f"{at}.attention.self.{part}").unflatten(-1, (-1, 8)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask[:, None, None], -1e9)
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        made = layer(context, f"{at}.attention.output.dense")
        x = norm(x + made, f"{at}.attention.output.LayerNorm")
        made = layer(gelu(layer(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = norm(x + made, f"{at}.output.LayerNorm")
    return layer(layer(x[:, 0], "bert.pooler.dense").tanh(), "classifier")


def test_the_reference_is_bert(tiny, inputs_for, logits):
    model, batch = tiny("bert"), inputs_for("bert")
    expected = logits(model, batch)
    found = torch_bert(model.state_dict(), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_masks_of_torch_prune(name, tiny, inputs_for, logits, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    base = base_model(model)
    site = find_sites(model)[1]
    module = projection(base, site.gate.module)
    mask = torch.ones_like(module.weight)
    mask[:, 5:17] = 0  # twelve neurons
    mask[3, 20] = 0  # and a single weight
    prune.custom_from_mask(module, "weight", mask)
    expected, state = logits(model, batch), model.state_dict()
    assert any(key.endswith("weight_mask") for key in state)
    folder = write_old(tmp_path / "old", state, model.config)
    result, loaded = check(name, folder, expected, batch, logits, tmp_path)
    assert result.found == ["1 masks of torch.nn.utils.prune", "12 heads and neurons of zeros"]
    assert find_sites(loaded)[1].units == 36
    assert logical_weight(projection(base_model(loaded), site.gate.module))[3, 8] == 0


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_zero_heads_and_neurons(name, tiny, inputs_for, logits, tmp_path, uneven_plan):
    """As nn_pruning saves them: everything that a unit owns is zero, and nothing is smaller."""
    model, batch, plan = tiny(name), inputs_for(name), uneven_plan(tiny(name))
    base = base_model(model)
    for site in find_sites(model):
        for item in site.slices:
            module = projection(base, item.module)
            for unit in plan.sites[site.name].removed:
                where = slice(
                    item.offset + unit * item.width, item.offset + (unit + 1) * item.width
                )
                weight = logical_weight(module).data
                (weight if item.axis == 0 else weight.T)[where] = 0
                if item.axis == 0 and module.bias is not None:
                    module.bias.data[where] = 0
    expected = logits(model, batch)
    folder = write_old(tmp_path / "old", model.state_dict(), model.config)
    result, loaded = check(name, folder, expected, batch, logits, tmp_path)
    gone = sum(len(site.removed) for site in plan.sites.values())
    assert result.found == [f"{gone} heads and neurons of zeros"]
    assert {s.name: s.units for s in find_sites(loaded)} == {
        n: len(s.kept) for n, s in plan.sites.items() if s.kept
    }


def test_nn_pruning_names_its_heads_too(tiny, inputs_for, logits, tmp_path):
    """Zeros of full size, and `pruned_heads` in the config."""
    model, batch = tiny("bert"), inputs_for("bert")
    for layer, head in ((0, 1), (1, 0), (1, 3)):
        attention = model.bert.encoder.layer[layer].attention
        attention.output.dense.weight.data[:, 8 * head : 8 * head + 8] = 0
    expected = logits(model, batch)
    model.config.pruned_heads = {0: [1], 1: [0, 3]}
    folder = write_old(tmp_path / "old", model.state_dict(), model.config)
    _, loaded = check("bert", folder, expected, batch, logits, tmp_path)
    assert [s.units for s in find_sites(loaded, ["heads"])] == [3, 2]


def test_nothing_pruned(tiny, tmp_path):
    model = tiny("bert")
    folder = write_old(tmp_path / "old", model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match="nothing was pruned"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Evil:
    """It would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_runs_nothing(tiny, tmp_path):
    folder = write_old(tmp_path / "old", {}, tiny("bert").config)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        read_old(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "a\\b"])
def test_an_index_that_leaves_the_folder(name, tmp_path):
    text = json.dumps({"weight_map": {"x": name}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not the plain name of a file beside it"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c, s: c.update(pruned_heads={"0": ["1"]}), "is not a list of heads"),
        (lambda c, s: c.update(pruned_heads={"0": [-1]}), "is not a list of heads"),
        (lambda c, s: c.update(pruned_heads={"x": [1]}), "is not a list of heads"),
        (lambda c, s: c.update(pruned_heads=[1]), "is not a table of layers"),
        (lambda c, s: c.update(pruned_heads={"0": [9]}), "names head 9 of layer 0, which has 4"),
        (lambda c, s: c.update(model_type="t6"), "model_type 't6' of the config is not known"),
        (lambda c, s: c.update(architectures=["os"]), "no class of transformers"),
        (lambda c, s: s.pop("classifier.bias"), "the weights do not fit"),
        (lambda c, s: s.update({"classifier.bias": torch.ones(4)}), "pruning makes matrices sm"),
        (
            lambda c, s: s.pop("bert.encoder.layer.0.output.dense.weight"),
            r"the weights have no encoder\.layer\.0\.output\.dense\.weight",
        ),
        (lambda c, s: s.update({"x.weight_orig": torch.ones(2)}), "has no mask of its shape"),
    ],
)
def test_folders_that_are_wrong(change, text, tiny, tmp_path):
    model = tiny("bert")
    state = dict(model.state_dict())
    config = {**model.config.to_dict(), "architectures": [ARCHITECTURES["bert"]]}
    change(config, state)
    folder = write_old(tmp_path / "old", state, model.config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=text):
        read_old(folder)


def test_no_weights(tmp_path, tiny):
    tiny("bert").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no class of transformers"):
        read_old(tmp_path)


def test_the_command(tiny, tmp_path):
    model = tiny("bert")
    remove_units(model, heads_plan(model))
    model.config.pruned_heads = {0: [1], 1: [0, 3]}
    folder = write_old(tmp_path / "old", model.state_dict(), model.config)
    run = CliRunner().invoke
    result = run(main, ["convert", str(folder), str(tmp_path / "new")])
    assert result.exit_code == 0
    assert "pruned_heads of transformers 4: 3 heads" in result.output
    result = run(main, ["convert", str(folder), str(tmp_path / "new")])
    assert (result.exit_code, OutputExistsError.__name__ in result.output) == (1, True)

"""A module beside the weights: the model loads where there is no hf_prune."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tinies import auto_class
from transformers import AutoModel, BertModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_prune.checkpoint.manifest import verify
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.standalone import MODULE
from hf_prune.errors import CheckpointError
from hf_prune.surgery.remove import remove_units


@pytest.fixture
def saved(tiny, uneven_plan, tmp_path):
    def make(name):
        model = tiny(name)
        remove_units(model, uneven_plan(model))
        save_model(model, tmp_path / "out", standalone=True)
        return model, tmp_path / "out"

    return make


@pytest.fixture
def no_hook(monkeypatch, tmp_path):
    """As in a process that has not imported hf_prune: the module must register its own loader."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_prune")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "hf_prune")
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    yield
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop("hf_prune", None)
    AUTO_QUANTIZER_MAPPING.pop("hf_prune", None)


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "gpt2", "gpt_neox", "phi3", "mixtral", "t5", "vit"]
)
def test_loads_by_its_own_module(name, saved, no_hook, inputs_for, logits):
    model, folder = saved(name)
    batch = inputs_for(name)
    loaded, info = auto_class(name).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert AUTO_QUANTIZER_MAPPING["hf_prune"].__module__.endswith(MODULE)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == type(model).__name__, "the loss is chosen by this name"
    assert type(loaded).__module__.endswith(MODULE)
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=0)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__module__.endswith(MODULE)


def test_saved_again_it_still_stands_alone(saved, no_hook, tmp_path, inputs_for, logits):
    model, folder = saved("bert")
    kind = auto_class("bert")
    kind.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / f"{MODULE}.py").is_file()
    again = kind.from_pretrained(tmp_path / "again", trust_remote_code=True)
    batch = inputs_for("bert")
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_with_hf_prune_its_module_is_not_needed(saved, inputs_for, logits):
    model, folder = saved("bert")
    loaded = auto_class("bert").from_pretrained(folder)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, inputs_for("bert")), logits(model, inputs_for("bert")))
    assert f"{MODULE}.py" in verify(folder)


def test_the_module_imports_nothing_of_ours(saved):
    _, folder = saved("bert")
    text = (folder / f"{MODULE}.py").read_text()
    assert "from hf_prune" not in text
    assert "import hf_prune\n" not in text
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert (
        auto_map["AutoModelForSequenceClassification"] == f"{MODULE}.BertForSequenceClassification"
    )
    assert auto_map["AutoModel"] == f"{MODULE}.BertModel"


class OwnBert(BertModel):
    """A class that transformers does not have."""


def test_a_class_of_ones_own_is_refused(tiny, tmp_path):
    model = OwnBert(tiny("bert").config)
    with pytest.raises(CheckpointError, match="OwnBert is not a class of transformers"):
        save_model(model, tmp_path / "out", standalone=True)
    assert list(tmp_path.iterdir()) == []


CODE = """
import sys
sys.modules["hf_prune"] = None  # an import of it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
saved = load_file(sys.argv[1] + "/model.safetensors")
assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())
print("parameters", sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
def test_in_a_process_without_hf_prune(saved, tmp_path):
    model, folder = saved("bert")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"parameters {sum(p.numel() for p in model.parameters())}" in done.stdout

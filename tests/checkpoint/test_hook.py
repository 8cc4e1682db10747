"""Loading: what a config may say, and what happens when it says something else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_prune.errors import CheckpointError
from hf_prune.surgery.description import TABLES
from hf_prune.surgery.rebuild import apply_shapes_
from hf_prune.surgery.remove import remove_units

QUERY = "encoder.layer.0.attention.self.query"
CORE = "encoder.layer.0.attention.self"


@pytest.fixture(scope="module")
def saved(tiny, uneven_plan, tmp_path_factory):
    """A pruned BERT on disk, and the text of its config."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny("bert")
    remove_units(model, uneven_plan(model))
    model.save_pretrained(folder)
    return folder, (folder / "config.json").read_text()


@pytest.fixture
def load(saved, monkeypatch):
    """Load after a change to the quantization_config; fails if any weight is read."""
    folder, text = saved

    def read(*args, **kwargs):
        raise RuntimeError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)

    def run(change):
        config = json.loads(text)
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        try:
            AutoModelForSequenceClassification.from_pretrained(folder)
        finally:
            (folder / "config.json").write_text(text)

    return run


def test_the_unchanged_config_gets_as_far_as_the_weights(load):
    with pytest.raises(RuntimeError, match="weights were read"):
        load(lambda spec: None)


NOT_A_SIZE = [-1, True, False, 1.0, 8.5, "8", None, [8], {"a": 8}]


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
@pytest.mark.parametrize("key", ["out", "in"])
def test_module_size_that_is_none(load, value, key):
    with pytest.raises(CheckpointError, match=rf"modules\['{QUERY}'\]\.{key} = "):
        load(lambda spec: spec["modules"][QUERY].update({key: value}))


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
def test_attribute_that_is_no_size(load, value):
    with pytest.raises(CheckpointError, match=rf"attributes\['{CORE}'\]\.all_head_size = "):
        load(lambda spec: spec["attributes"][CORE].update(all_head_size=value))


@pytest.mark.parametrize("value", [33, 2**31, 2**63, 10**30])
def test_larger_than_the_model(load, value):
    with pytest.raises(CheckpointError, match=rf"{QUERY}: the config asks for \[{value}, "):
        load(lambda spec: spec["modules"][QUERY].update(out=value))
    with pytest.raises(CheckpointError, match=rf"asks for \[\d+, {value}\]"):
        load(lambda spec: spec["modules"][QUERY].update({"in": value}))
    with pytest.raises(CheckpointError, match=f"all_head_size = {value} is larger than the model"):
        load(lambda spec: spec["attributes"][CORE].update(all_head_size=value))


@pytest.mark.parametrize("name", ["encoder.layer.9.output.dense", "nowhere", "__class__", "a..b"])
@pytest.mark.parametrize("table", ["modules", "attributes"])
def test_unknown_module(load, name, table):
    entry = {"out": 1, "in": 1} if table == "modules" else {"all_head_size": 1}
    with pytest.raises(CheckpointError, match=f"names '{name}', and BertModel has no such module"):
        load(lambda spec: spec[table].update({name: entry}))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embeddings.word_embeddings", "Embedding"),
        ("embeddings.LayerNorm", "LayerNorm"),
        ("encoder.layer.0", "BertLayer"),
        ("", "BertModel"),
    ],
)
def test_module_that_cannot_be_resized(load, name, kind):
    with pytest.raises(CheckpointError, match=f"{name} is a {kind}; only Linear and Conv1D"):
        load(lambda spec: spec["modules"].update({name: {"out": 1, "in": 1}}))


@pytest.mark.parametrize(
    "attribute", ["training", "config", "_modules", "__class__", "forward", "invented", "query"]
)
def test_attribute_that_cannot_be_set(load, attribute):
    with pytest.raises(CheckpointError, match=rf"{attribute} is not a size that can be set"):
        load(lambda spec: spec["attributes"][CORE].update({attribute: 1}))


@pytest.mark.parametrize("value", [0, 2, True, "1", None, -1, [1]], ids=repr)
def test_unknown_version(load, value):
    with pytest.raises(CheckpointError, match=r"quantization_config\.version is .*reads version 1"):
        load(lambda spec: spec.update(version=value))


def test_missing_version(load):
    with pytest.raises(CheckpointError, match=r"quantization_config\.version is None"):
        load(lambda spec: spec.pop("version"))


@pytest.mark.parametrize("key", ["out", "in"])
def test_missing_size(load, key):
    with pytest.raises(CheckpointError, match=rf"modules\['{QUERY}'\] must have 'out' and 'in'"):
        load(lambda spec: spec["modules"][QUERY].pop(key))


def test_a_size_too_many(load):
    with pytest.raises(CheckpointError, match=rf"modules\['{QUERY}'\] must have 'out' and 'in'"):
        load(lambda spec: spec["modules"][QUERY].update(groups=1))


HEADS = {"bias": "t5", "kept": [0]}
EMPTY = {"kind": "context", "out": "", "cross": False}


@pytest.mark.parametrize(
    ("table", "name", "entry", "text"),
    [
        ("heads", CORE, {"bias": "t5"}, "must have 'kept' and a 'bias' of"),
        ("heads", CORE, {**HEADS, "bias": "own"}, "must have 'kept' and a 'bias' of"),
        ("heads", CORE, {**HEADS, "bias": ["t5"]}, "must have 'kept' and a 'bias' of"),
        ("heads", CORE, {**HEADS, "kept": [1, 0]}, r"kept is not a sorted list of heads"),
        ("heads", CORE, {**HEADS, "kept": [1, 1]}, r"kept is not a sorted list of heads"),
        ("heads", CORE, {**HEADS, "kept": [-1]}, r"kept is not a sorted list of heads"),
        ("heads", CORE, {**HEADS, "kept": [True]}, r"kept is not a sorted list of heads"),
        ("heads", CORE, {**HEADS, "kept": 3}, r"kept is not a sorted list of heads"),
        ("heads", CORE, HEADS, "BertSelfAttention, which shares no position bias"),
        ("heads", "nowhere", HEADS, "no such module"),
        ("empty", CORE, {**EMPTY, "kind": "os"}, "must have a 'kind' of"),
        ("empty", CORE, {**EMPTY, "cross": 1}, "must have a 'kind' of"),
        ("empty", CORE, {**EMPTY, "more": 1}, "must have a 'kind' of"),
        ("empty", CORE, {**EMPTY, "kind": "block"}, "no attention with an output projection ''"),
        ("empty", CORE, {**EMPTY, "kind": "t5", "out": "query"}, "no attention with an output"),
        ("empty", "encoder", EMPTY, "BertEncoder is no attention"),
        ("parameters", "pooler.dense.weight", {"0": 1}, "is not a list"),
        ("parameters", "pooler.dense.weight", [1, -1], "= -1 is negative"),
        ("parameters", "pooler.dense.weight", [1, 1.0], "= 1.0 is not an integer"),
        ("parameters", "pooler.dense.weight", [33, 1], r"the config asks for \[33, 1\]"),
        (
            "parameters",
            "pooler.dense.weight",
            [1],
            r"asks for \[1\], the model has only",
        ),
        ("parameters", "pooler.dense.wait", [1, 1], "no such parameter"),
        ("parameters", "nowhere.weight", [1, 1], "no such module"),
    ],
)
def test_entries_of_other_tables(load, table, name, entry, text):
    with pytest.raises(CheckpointError, match=text):
        load(lambda spec: spec.setdefault(table, {}).update({name: entry}))


@pytest.mark.parametrize("value", [[], 3, "x", True, [1, 2]], ids=repr)
@pytest.mark.parametrize("table", ["modules", "attributes"])
def test_table_that_is_none(load, table, value):
    with pytest.raises(CheckpointError, match=rf"quantization_config\.{table} is not a table"):
        load(lambda spec: spec.update({table: value}))
    with pytest.raises(
        CheckpointError, match=rf"quantization_config\.{table}\['x'\] is not a table"
    ):
        load(lambda spec: spec[table].update(x=value))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
NAMES = st.text(max_size=12) | st.sampled_from([QUERY, CORE, "", "encoder", "out", "in"])
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.dictionaries(st.sampled_from(["version", *TABLES]), JSON))
def test_any_data_is_refused_or_harmless(data):
    """Either an error of ours, and nothing changed; or the model only became smaller."""
    model = MODEL()
    before = {n: (id(p), p.shape) for n, p in model.named_parameters()}
    try:
        apply_shapes_(model, {"version": 1, **data})
    except CheckpointError:
        assert {n: (id(p), p.shape) for n, p in model.named_parameters()} == before
    else:
        for name, parameter in model.named_parameters():
            assert all(a <= b for a, b in zip(parameter.shape, before[name][1], strict=True))


def MODEL():  # built on `meta`: nothing is allocated
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with torch.device("meta"):
        return BertModel(config)


def test_wrong_half_changes_nothing():
    """Everything is checked before the first module is resized."""
    model = MODEL()
    shapes = {
        "version": 1,
        "modules": {QUERY: {"out": 4, "in": 8}},
        "attributes": {CORE: {"all_head_size": 4, "num_attention_heads": 3}},
    }
    with pytest.raises(CheckpointError, match=r"num_attention_heads = 3 is larger"):
        apply_shapes_(model, shapes)
    core = model.get_submodule(CORE)
    assert core.query.weight.shape == (8, 8)
    assert (core.all_head_size, core.num_attention_heads) == (8, 2)
    shapes["attributes"][CORE]["num_attention_heads"] = 1
    apply_shapes_(model, shapes)
    assert core.query.weight.shape == (4, 8)
    assert core.query.bias.shape == (4,)
    assert (core.query.out_features, core.query.in_features) == (4, 8)
    assert (core.all_head_size, core.num_attention_heads) == (4, 1)
    assert core.query.weight.is_meta


def test_ignore_mismatched_sizes_changes_nothing(saved):
    folder, _ = saved
    strict = AutoModelForSequenceClassification.from_pretrained(folder)
    loose, info = AutoModelForSequenceClassification.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert not info["mismatched_keys"]
    assert not info["missing_keys"]
    for (name, ours), theirs in zip(strict.named_parameters(), loose.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_that_do_not_fit_the_config_are_refused(saved):
    folder, text = saved
    config = json.loads(text)
    spec = config["quantization_config"]
    spec["modules"][QUERY]["out"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with pytest.raises(RuntimeError, match=r"(?i)size|mismatch"):
            AutoModelForSequenceClassification.from_pretrained(folder)
    finally:
        (folder / "config.json").write_text(text)


def test_a_new_head_may_be_asked_for(saved):
    """`ignore_mismatched_sizes` still does what it is for: another number of labels."""
    folder, _ = saved
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {item[0] for item in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (7, 32)


CODE = """
import sys
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_without_the_hook_loading_fails_loudly(saved):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CODE, str(saved[0])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hf_prune" in done.stderr
    assert "Error" in done.stderr.splitlines()[-1] or "mismatch" in done.stderr


def test_narrowing_is_not_slowed_by_the_mode_that_builds_on_meta(tiny, uneven_plan):
    """Where a model is built under `torch.device`, every look at a tensor passes through Python."""
    pruned = tiny("bert")
    remove_units(pruned, uneven_plan(pruned))
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = type(pruned)(pruned.config)
        with Watch():
            apply_shapes_(model, pruned.config.quantization_config)
    assert seen == []
    assert [p.shape for p in model.parameters()] == [p.shape for p in pruned.parameters()]
    assert {p.device.type for p in model.parameters()} == {"meta"}

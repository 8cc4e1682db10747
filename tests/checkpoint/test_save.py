"""Saving: a complete folder, or none."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_prune.checkpoint.manifest import MANIFEST, verify
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import NumericsError, OutputExistsError
from hf_prune.surgery.remove import remove_units


def test_saved_folder_is_described_in_full(tiny, uneven_plan, tmp_path):
    model = tiny("bert")
    plan = uneven_plan(model)
    remove_units(model, plan)
    save_model(model, tmp_path / "out", extra={"plan.json": plan.to_json()})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "plan.json", MANIFEST} <= names
    assert set(verify(tmp_path / "out")) == names - {MANIFEST}
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == plan.to_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_not_written(tiny, tmp_path, value):
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, :2] = value
    with pytest.raises(NumericsError, match=r"layer\.1\.output\.dense\.weight has 2 values"):
        save_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwrite(tiny, uneven_plan, tmp_path):
    model = tiny("bert")
    save_model(model, tmp_path / "out", extra={"old.txt": "old"})
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    with pytest.raises(OutputExistsError, match="Nothing was written"):
        save_model(model, tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    remove_units(model, uneven_plan(model))
    save_model(model, tmp_path / "out", overwrite=True)
    verify(tmp_path / "out")
    assert not (tmp_path / "out" / "old.txt").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)

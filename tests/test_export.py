"""Exported graphs: checked against the model, and usable beside it."""

import pytest
import torch
from click.testing import CliRunner
from words import word_tokenizer

import hf_prune.export as room
from hf_prune.errors import ConfigError, NumericsError
from hf_prune.measure.corners import CORNERS, four_corners
from hf_prune.surgery.remove import remove_units
from hf_prune_cli import main

for package in room.PACKAGES:
    pytest.importorskip(package, reason=f"{package} is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the exporter warns


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_graphs_of_pruned_models(name, tiny, inputs_for, uneven_plan, logits, tmp_path):
    model = tiny(name)
    remove_units(model, uneven_plan(model))
    caching = getattr(model.config, "use_cache", None)
    assert room.export_onnx(model, tmp_path / "out", int8=True) < 1e-5
    assert getattr(model.config, "use_cache", None) == caching
    batch = {k: v for k, v in inputs_for(name, 3).items() if k != "labels"}
    with torch.no_grad():
        wanted = model(**batch).logits
    mask = batch["attention_mask"].bool() if wanted.ndim == 3 else slice(None)
    found = room.OnnxModel(tmp_path / "out" / room.FLOAT, model)(**batch).logits
    torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-4)
    small = room.OnnxModel(tmp_path / "out" / room.INT8, model)(**batch).logits
    off = (small[mask] - wanted[mask]).norm() / wanted[mask].norm()
    assert 0 < off < 0.1


def test_four_corners_in_onnx_runtime_and_the_command(tiny, inputs_for, tmp_path, monkeypatch):
    dense, pruned, batch = tiny("bert"), tiny("bert"), inputs_for("bert")
    batch.pop("labels")

    def metric(model):
        with torch.no_grad():
            return float(model(**batch).logits.abs().sum())

    report = four_corners(
        dense, pruned, metric, batch_size=2, sequence_length=8, rounds=2, quantize=room.onnx_int8
    )
    assert tuple(report) == CORNERS
    assert report["quantized"]["metric"] == pytest.approx(report["dense"]["metric"], rel=0.1)
    assert report["quantized"]["metric"] != report["dense"]["metric"]
    monkeypatch.setattr(room, "TOLERANCE", -1.0)
    dense.save_pretrained(tmp_path / "model")
    word_tokenizer(["a"]).save_pretrained(tmp_path / "model")
    with pytest.raises(NumericsError, match="gives other outputs than BertForSequenceClass"):
        room.export_folder(str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_packages(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ConfigError, match=r"needs onnxscript\. Run: pip install 'hf_prune\[onnx"):
        room.export_onnx(tiny("bert"), tmp_path / "out")
    result = CliRunner().invoke(main, ["export", "--help"])
    assert "ONNX Runtime" in result.output

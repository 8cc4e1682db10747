"""Four corners: each model with its own metric and time, in one run."""

import pytest
import torch

from hf_prune.errors import ConfigError
from hf_prune.measure import corners
from hf_prune.measure.corners import CORNERS, four_corners, quantize_int8
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks

pytest.importorskip("torchao", reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao warns while it is imported


def test_int8_is_a_copy_and_close(tiny, inputs_for, logits):
    model, batch = tiny("bert"), inputs_for("bert")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize_int8(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    expected, found = logits(model, batch), logits(quantized, batch)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_each_corner_has_its_own_figures(tiny, inputs_for, logits):
    dense, pruned, batch = tiny("bert"), tiny("bert"), inputs_for("bert")
    apply_masks_(pruned, magnitude_masks(find_weights(pruned), 0.7))
    report = four_corners(
        dense,
        pruned,
        lambda model: float(logits(model, batch).abs().sum()),
        batch_size=2,
        sequence_length=8,
        rounds=2,
    )
    assert tuple(report) == CORNERS
    assert len({entry["metric"] for entry in report.values()}) == 4
    assert report["dense"]["ratio"] == 1
    assert all(entry["median_ms"] > 0 for entry in report.values())
    assert report["pruned"]["nonzero_parameters"] < report["dense"]["nonzero_parameters"]


def test_without_torchao(tiny, monkeypatch):
    monkeypatch.setattr(corners, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="int8 needs torchao"):
        quantize_int8(tiny("bert"))

"""What trackers are told: read back from the files that they write."""

import json
import sqlite3

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import recipe, trainer

from hf_prune import DistillCallback, PruneCallback, prepare_trainer

SHOWN = {
    "prune/sparsity",
    "prune/kept_heads",
    "prune/kept_neurons",
    "prune/parameters",
    "prune/macs",
    "distill/logits",
    "distill/hidden",
    "distill/labels",
    "distill/alpha",
}
"""Every figure of a pruning with a teacher."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trackers, not ours
def test_tensorboard_and_trackio_get_every_figure(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    callbacks = PruneCallback(recipe()), DistillCallback(tiny("bert"), hidden=1.0)
    options = {"report_to": ["tensorboard", "trackio"], "project": "tiny", "run_name": "one"}
    job = trainer(tiny("bert"), tmp_path / "out", *callbacks, save_strategy="no", **options)
    prepare_trainer(job).train()
    told = [entry for entry in job.state.log_history if "loss" in entry]

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in SHOWN:
        points = [event.value for event in board.Scalars(f"train/{name}")]
        assert points == pytest.approx([entry[name] for entry in told], rel=1e-5), name

    with sqlite3.connect(tmp_path / "trackio" / "tiny.db") as file:
        logged = [json.loads(row[0]) for row in file.execute("select metrics from metrics")]
    steps = [entry for entry in logged if "train/loss" in entry]
    assert len(steps) == len(told)
    for name in SHOWN:
        found = [entry[f"train/{name}"] for entry in steps]
        assert found == pytest.approx([entry[name] for entry in told], rel=1e-5), name

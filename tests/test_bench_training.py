"""The benchmarks of training, at their smallest: kills, and curves."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench_curves
import bench_resume


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="the launcher forks")
def test_killed_and_resumed_on_two_processes_ends_as_one_that_ran_through():
    row = bench_resume.killed_and_resumed("l0", 2, 1, 0)
    assert row["kills"] == row["identical"] == 1
    assert row["half_models"] == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="the launcher forks")
def test_a_divided_batch_has_the_same_curve_and_plan_once_prepared():
    whole = bench_curves.curve("classifier", 1, 1, prepared=True)
    divided = bench_curves.compared(bench_curves.curve("classifier", 2, 2, prepared=True), whole)
    assert divided["loss_difference"] < 1e-5
    assert divided["same_plan"]
    bare = bench_curves.compared(bench_curves.curve("classifier", 2, 1, prepared=False), whole)
    assert bare["ratio"] == pytest.approx(2, rel=1e-3), "what transformers 5 makes of it"

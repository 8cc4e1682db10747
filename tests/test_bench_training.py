"""The benchmarks of training, at their smallest: kills, and curves."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench_resume  # a script, found by the line above


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="the launcher forks")
def test_killed_and_resumed_on_two_processes_ends_as_one_that_ran_through():
    row = bench_resume.killed_and_resumed("l0", 2, 1, 0)
    assert row["kills"] == row["identical"] == 1
    assert row["half_models"] == 0

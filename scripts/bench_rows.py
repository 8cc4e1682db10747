"""What all benchmarks write: rows by name, kept as they come, and times of things done in turn."""

import json
import resource
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_prune.report.result import environment

LIGHT = ", ridge 0.01"
"""Ends the names of rows with the ridge of encoders in the place of that of decoders."""


def commit() -> str:
    """Of the code that runs, with a plus where files differ from it; empty where git is not."""
    try:
        told = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(
            told, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Rows:
    """A JSON file of rows by name; a row that is there is not computed again."""

    def __init__(self, out: Path) -> None:
        self.out, self.commit = out, commit()
        self.data: dict[str, Any] = {"environment": environment(), "rows": {}}
        if out.is_file():
            self.data = json.loads(out.read_text(encoding="utf-8"))

    def __contains__(self, key: str) -> bool:
        return key in self.data["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Write a row at once, with the commit that it is of."""
        self.data["rows"][key] = row | {"commit": self.commit}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        part.replace(self.out)
        print(key, row, flush=True)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_turn(
    actions: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int
) -> dict[str, dict[str, float]]:
    """The times of some actions, each done once a round.

    Args:
        actions: by name; each returns its milliseconds. Ratios are to the first.
        rounds: measured ones.
        warm_up: rounds before them.

    Returns:
        By name the median in milliseconds, and the median over rounds of the ratio to the first.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm_up + rounds):
        for name, action in actions.items():
            elapsed = action()
            if turn >= warm_up:
                times[name].append(elapsed)
    first = next(iter(times.values()))
    return {
        name: {
            "median_ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
            "rounds": rounds,
        }
        for name, values in times.items()
    }

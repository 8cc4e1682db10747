"""Write docs/benchmarks.md from the JSON files that scripts/benchmark.py has written.

python scripts/render_benchmarks.py        # reads docs/benchmarks/*.json
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
COLUMNS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("f1", "F1", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("kept_of_dense", "of dense", "{:.4f}"),
    ("recovered", "recovered", "{:.4f}"),
    ("sparsity", "sparsity", "{:.4f}"),
    ("encoder_removed", "encoder removed", "{:.3f}"),
    ("nonzero_of_dense", "not zero", "{:.3f}"),
    ("speedup", "speed-up", "{:.2f}"),
    ("speedup_measured_again", "measured again", "{:.2f}"),
    ("deviation", "off by", "{:+.3f}"),
    ("ratio", "ratio to the first", "{:.3f}"),
    ("median_ms", "median ms", "{:.1f}"),
    ("cpu_seconds", "CPU s", "{:.1f}"),
    ("cpu_seconds_per_layer", "CPU s a layer", "{:.2f}"),
    ("over_two_forward_passes", "over two forward passes", "{:.2f}"),
    ("seconds_of_5000_samples", "CPU s of an epoch of 5,000", "{:.0f}"),
    ("kills", "killed and resumed", "{:d}"),
    ("identical", "identical", "{:d}"),
    ("torn_checkpoints", "newest checkpoint torn", "{:d}"),
    ("half_models", "half-written models", "{:d}"),
    ("loss_difference", "largest difference of a loss", "{:.1e}"),
    ("same_plan", "same plan", "{!s}"),
    ("peak_bytes", "peak bytes", "{:.2e}"),
)
"""What a row may say, in this order: key, title, format."""


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row, those of its timing among them."""
    return {**(row.get("timing") or {}), **row}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows of one benchmark as Markdown; columns that no row has are left out."""
    flat = {name: _values(row) for name, row in rows.items()}
    used = [
        column
        for column in COLUMNS
        if any(isinstance(row.get(column[0]), int | float) for row in flat.values())
    ]
    lines = [["", *(title for _, title, _ in used)], ["---"] * (len(used) + 1)]
    for name, row in flat.items():
        cells = [
            form.format(row[key]) if isinstance(row.get(key), int | float) else ""
            for key, _, form in used
        ]
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Render."""
    parts = [
        "# Benchmarks",
        "Rendered by `python scripts/render_benchmarks.py` from the files in `docs/benchmarks/`, "
        "which `python scripts/benchmark.py` writes. They hold versions and hardware, too. "
        "Times are CPU seconds of one thread on a machine with other work; dense is measured in "
        "the same run.",
    ]
    for path in sorted(FOLDER.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        versions = data["environment"]["versions"]
        about = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
        parts += [f"## {path.stem}", about + ".", table(data["rows"])]
    (ROOT / "docs" / "benchmarks.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

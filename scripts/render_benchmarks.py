"""Write docs/benchmarks.md from the JSON files that scripts/benchmark.py has written.

python scripts/render_benchmarks.py        # reads docs/benchmarks/*.json
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
STAGES = ("statistics", "scores", "dense_pass", "solve", "remove", "reconstruct")
"""Of a structured decision, each with its wall time."""
COLUMNS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("f1", "F1", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("plots", "perplexity of film plots", "{:.2f}"),
    ("tokens", "tokens learned from", "{:d}"),
    ("kept_of_dense", "of dense", "{:.4f}"),
    ("recovered", "recovered", "{:.4f}"),
    ("sparsity", "sparsity", "{:.4f}"),
    ("encoder_removed", "encoder removed", "{:.3f}"),
    ("nonzero_of_dense", "not zero", "{:.3f}"),
    ("left_of_dense", "left without dead channels", "{:.3f}"),
    ("speedup", "speed-up", "{:.2f}"),
    ("speedup_measured_again", "measured again", "{:.2f}"),
    ("deviation", "off by", "{:+.3f}"),
    ("ratio", "ratio to the first", "{:.3f}"),
    ("median_ms", "median ms", "{:.1f}"),
    ("cpu_seconds", "CPU s", "{:.1f}"),
    ("cpu_seconds_per_layer", "CPU s a layer", "{:.2f}"),
    ("over_two_forward_passes", "over two forward passes", "{:.2f}"),
    *((f"seconds.{stage}", stage.replace("_", " ") + " s", "{:.1f}") for stage in STAGES),
    ("seconds_of_5000_samples", "CPU s of an epoch of 5,000", "{:.0f}"),
    ("kills", "killed and resumed", "{:d}"),
    ("identical", "identical", "{:d}"),
    ("torn_checkpoints", "newest checkpoint torn", "{:d}"),
    ("half_models", "half-written models", "{:d}"),
    ("loss_difference", "largest difference of a loss", "{:.1e}"),
    ("same_plan", "same plan", "{!s}"),
    ("peak_bytes", "peak bytes of the process so far", "{:.2e}"),
)
"""What a row may say, in this order: key, title, format."""


_LEVEL = r"(?P<level>\d\.\d+ of the encoder|[\d.]+x|\d:\d|0\.\d+)"
Grid = tuple[re.Pattern[str], str, str]
_TEXT: Grid = (
    re.compile(rf"[\w-]+ {_LEVEL} (?P<method>.+) seed \d"),
    "kept_of_dense",
    "{:.3f}",
)
_LANGUAGE: Grid = (re.compile(rf"{_LEVEL} (?P<method>.+)"), "perplexity", "{:.1f}")
_TRAINED = re.compile(rf"[\w-]+:\d (?P<method>\w+) {_LEVEL}(?P<how> taught)?")
_TRAINING: Grid = (_TRAINED, "kept_of_dense", "{:.3f}")
_RECOVERY: Grid = (
    re.compile(rf"(?P<data>[\w-]+):\d {_LEVEL} (?P<method>.+)"),
    "kept_of_dense",
    "{:.3f}",
)
GRIDS = {
    "structured_rotten_tomatoes": _TEXT,
    "structured_reuters_r8": _TEXT,
    "structured_smollm2": _LANGUAGE,
    "weights_rotten_tomatoes": _TEXT,
    "weights_reuters_r8": _TEXT,
    "weights_smollm2": _LANGUAGE,
    "weights_recovery": _RECOVERY,
    "training_methods": _TRAINING,
    "training_methods_r8_epoch": _TRAINING,
    "training_methods_r8": _TRAINING,
}
"""Files whose rows are methods at levels: how a row is named, what a cell is, and its format."""
_STEPS = (
    "Every row learns for {steps} steps of 32 texts, from the same dense model, to a speed-up that "
    "is asked for and measured on this machine. `one_shot` is pruned before; with the others masks "
    "close within the first 60 % of the steps: `gradual` by gradients of training, `calibrated` by "
    "the step of `one_shot`, `movement` and `l0` by masks that are learned. Taught: half of the "
    "loss is that of the dense model."
)
_DRAWS = (
    "One dense model; another seed is another draw of 512 calibration examples. Nothing is trained "
    "after removal."
)
_WIKITEXT = (
    "Perplexity of the first 8 x 512 tokens of WikiText-2 test; calibrated on the first 32 x 512 "
    "of valid. Nothing is trained after removal."
)
_CHANCE_OF_TEXTS = (
    "Drawing the texts that are measured on again would move a share by about 0.009 on Rotten "
    "Tomatoes and 0.004 on Reuters-R8 (standard error)."
)
_CHANCE = "One calibration draw; nothing is trained. " + _CHANCE_OF_TEXTS
ABOUT = {
    "structured_rotten_tomatoes": _DRAWS,
    "structured_reuters_r8": "Two dense models, made alike: names of the second one begin with "
    "reuters-r8-again, and each row is a share of the accuracy of its own. Another seed is "
    "another draw of 512 calibration examples. Nothing is trained after removal.",
    "structured_smollm2": _WIKITEXT,
    "weights_smollm2": _WIKITEXT + " Where the dense network is aimed at, the ridge is 0.1, the "
    "default for decoders, if a row does not say otherwise. Rounding alone moves a perplexity by "
    "up to 5 %, since masks that are as good differ. With judges held out one sequence in five is "
    "fitted by nothing, and says whether steps on norms are kept.",
    "weights_memory": "A random Llama of a billion parameters in bfloat16, half of its single "
    "weights gone from disk to disk, one layer in memory at a time; 4 x 512 tokens.",
    "weights_rotten_tomatoes": _CHANCE,
    "weights_reuters_r8": _CHANCE,
    "weights_recovery": "Before and after 94 steps of 32 texts by labels alone, at a learning rate "
    "of 1e-4, in which zeros stay; one run each. " + _CHANCE_OF_TEXTS,
    "training_methods": _STEPS.format(steps=188)
    + " The second seed has a split of the data and a dense model of its own.",
    "training_methods_r8": _STEPS.format(steps=62),
    "training_methods_r8_epoch": _STEPS.format(steps=171),
    "training_students": "188 steps on 2,000 texts.",
    "training_students_375_steps": "375 steps on 6,000 texts.",
    "training_students_1128_steps": "1,128 steps on 6,000 texts. Another seed is another split of "
    "the data, with a dense model of its own.",
    "training_lm": "A quarter of heads and neurons gone, calibrated on WikiText-2 valid, "
    "recovered on plots of films. Perplexity is that of WikiText-2 test; plots are of other films.",
}
"""What is said of some files before their tables."""
TITLES = {
    "kept_of_dense": "Share of the dense accuracy that is kept",
    "perplexity": "Perplexity",
}
"""Of the cells of a grid."""


def grid(rows: dict[str, dict[str, Any]], name: str) -> list[str]:
    """Methods as rows and levels as columns, the median over seeds in each cell; and the rest."""
    pattern, key, form = GRIDS[name]
    cells: dict[str, dict[str, list[float]]] = {}
    levels: list[str] = []
    others = {}
    for title, row in rows.items():
        found = pattern.fullmatch(title)
        if found is None or key not in row:
            others[title] = row
            continue
        parts = found.groupdict()
        about = f"{parts['data']}: " if "data" in parts else ""
        method = about + parts["method"] + (parts.get("how") or "")
        cells.setdefault(method, {}).setdefault(parts["level"], []).append(row[key])
        levels += [parts["level"]] * (parts["level"] not in levels)
    levels.sort(key=_in_order)
    seeds = max((len(v) for line in cells.values() for v in line.values()), default=1)
    lines = [["", *levels], ["---"] * (len(levels) + 1)]
    for method, line in cells.items():
        values = (line.get(level) for level in levels)
        lines.append([method, *(_cell(v, form, alone=seeds == 1) for v in values)])
    made = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = "" if seeds == 1 else ", median over seeds (their number)"
    shown = [*([table(others)] if others else []), f"{TITLES[key]}{count}:", made]
    return shown + stage_table(rows, next(iter(cells), ""))


def _in_order(level: str) -> tuple[str, float]:
    """Levels of one kind together, by their number."""
    number = re.match(r"[0-9.]+", level)
    return (level[number.end() :], float(number[0])) if number else (level, 0.0)


def _cell(values: list[float] | None, form: str, *, alone: bool) -> str:
    if values is None:
        return ""
    return form.format(statistics.median(values)) + ("" if alone else f" ({len(values)})")


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row, those of its timing and of its stages among them."""
    seconds = row.get("seconds")
    stages = seconds if isinstance(seconds, dict) else {}
    named = {f"seconds.{stage}": value for stage, value in stages.items()}
    return {**(row.get("timing") or {}), **named, **row}


def stage_table(rows: dict[str, dict[str, Any]], method: str) -> list[str]:
    """How long each stage of one method took, and its peak memory, where rows say it."""
    keys = ("cpu_seconds", "seconds", "peak_bytes")
    found = {
        title: {key: row[key] for key in keys if key in row}
        for title, row in rows.items()
        if f" {method}" in title and isinstance(row.get("seconds"), dict)
    }
    return (
        ["Wall time of each stage of the first method, where other work ran too:", table(found)]
        if found
        else []
    )


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
        known = path.stem in GRIDS
        shown = grid(data["rows"], path.stem) if known else [table(data["rows"])]
        said = [ABOUT[path.stem]] if path.stem in ABOUT else []
        parts += [f"## {path.stem}", about + ".", *said, *shown]
    (ROOT / "docs" / "benchmarks.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

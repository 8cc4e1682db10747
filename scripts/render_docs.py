"""Fill the results of both READMEs, and the card of the demo, from the report of a run.

python scripts/render_docs.py runs/prune_bert
"""

import json
import shutil
import sys
from pathlib import Path

from hf_prune.report.card import render_card
from hf_prune.report.table import report_rows

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(report: dict) -> str:  # type: ignore[type-arg]  # JSON
    """The figures of a report as a Markdown table."""
    head, rows = report_rows(report)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Render."""
    run = Path(sys.argv[1])
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for name in ("README.md", "README.zh-CN.md"):
        path = ROOT / name
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        path.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}", encoding="utf-8")
    cards = ROOT / "model_cards" / "minilm-l6-rotten-tomatoes-2x"
    cards.mkdir(parents=True, exist_ok=True)
    (cards / "README.md").write_text(render_card(report), encoding="utf-8")
    shutil.copy(run / "report.json", cards / "report.json")
    shutil.copy(run / "units.svg", cards / "units.svg")


if __name__ == "__main__":
    main()

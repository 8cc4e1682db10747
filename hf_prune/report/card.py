"""The model card, rendered from a report."""

import math
import re
from typing import Any

import jinja2
import yaml

from hf_prune.errors import NumericsError
from hf_prune.report.table import report_rows

_UNSAFE = re.compile(r"([\\`*_{}\[\]<>|#!])")


def plain(text: object) -> str:
    """Any text as one line of Markdown that shows as it is and does nothing else."""
    line = " ".join(str(text).split())
    return _UNSAFE.sub(r"\\\1", line)


def _accuracy(report: dict[str, Any]) -> float | None:
    stages = report["stages"]
    last = stages.get("recovered") or stages.get("pruned") or {}
    value = last.get("accuracy")
    if value is not None and not math.isfinite(value):
        raise NumericsError(f"accuracy={value} cannot go on a card.")
    return value


def needs_loader(report: dict[str, Any]) -> bool:
    """Whether the model loads with hf_prune only: for its widths, or its zeros stored as bits."""
    if report["recipe"].get("portable"):
        return False
    if "storage" in report:
        return True
    return any(s.get("kind") == "structure" or s.get("dead_units") for s in report["pruning"])


def card_metadata(report: dict[str, Any]) -> dict[str, Any]:
    """The front matter: what the Hub reads."""
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["hf-prune", "pruned"]}
    if report.get("base_model"):
        metadata["base_model"] = report["base_model"]
        metadata["base_model_relation"] = "finetune"
    kinds = {stage.get("kind") for stage in report["pruning"]}
    structural = bool(kinds & {"structure", "vocabulary"})
    metadata["tags"].append("structured-pruning" if structural else "sparse")
    if report.get("task"):
        metadata["pipeline_tag"] = report["task"]
    for name in ("license", "language"):
        if report.get(name):
            metadata[name] = report[name]
    accuracy = _accuracy(report)
    if accuracy is not None and report.get("dataset"):
        metadata["model-index"] = [
            {
                "name": str(report.get("name") or "pruned model"),
                "results": [
                    {
                        "task": {"type": report.get("task") or "text-classification"},
                        "dataset": {"name": report["dataset"], "type": report["dataset"]},
                        "metrics": [{"type": "accuracy", "value": round(accuracy, 6)}],
                    }
                ],
            }
        ]
    return metadata


def render_card(report: dict[str, Any], repo_id: str | None = None) -> str:
    """The card as Markdown with front matter. Every figure on it is in the report.

    Raises:
        NumericsError: when a figure is not finite.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_prune", "report"),
        autoescape=False,  # Markdown: `plain` escapes what is not ours
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    head, rows = report_rows(report)
    metadata = yaml.safe_dump(card_metadata(report), sort_keys=False, allow_unicode=True)
    return environment.get_template("card.md.jinja").render(
        metadata=metadata,
        report=report,
        repo_id=repo_id,
        loader=needs_loader(report),
        head=head,
        rows=rows,
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False),
    )

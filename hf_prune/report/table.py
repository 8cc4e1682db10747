"""The figures of a report as one table for people."""

from typing import Any

from rich.table import Table

from hf_prune.errors import ConfigError

COLUMNS = ("dense", "pruned", "recovered")
"""The stages of a report, in order."""


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f} M"


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms"


_ROWS = (
    ("accuracy", "Accuracy", _percent),
    ("exact_match", "Exact match", _percent),
    ("f1", "F1", _percent),
    ("perplexity", "Perplexity", lambda value: f"{value:.2f}"),
    ("parameters", "Parameters", _millions),
    ("encoder_parameters", "Encoder parameters", _millions),
    ("nonzero_parameters", "Parameters that are not zero", _millions),
    ("macs", "MACs of one sequence", _millions),
    ("bytes", "Bytes of weights", lambda value: f"{value / 1e6:.2f} MB"),
    ("latency_ms", "Latency", _milliseconds),
    ("latency_ms_batch_1", "Latency, batch 1", _milliseconds),
)


def report_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table; shares of the dense figure stand in brackets.

    Raises:
        ConfigError: when the report has no stage `dense`.
    """
    stages = report["stages"]
    if "dense" not in stages:
        raise ConfigError("the report has no stage 'dense' to compare with.")
    present = [name for name in COLUMNS if name in stages]
    rows = []
    for key, title, show in _ROWS:
        dense = stages["dense"].get(key)
        if dense is None:
            continue
        cells = [title]
        for name in present:
            value = stages[name].get(key)
            text = "" if value is None else show(value)
            if name != "dense" and value is not None and dense:
                text += f" ({value / dense:.3f})"
            cells.append(text)
        rows.append(cells)
    return ["", *present], rows


def report_table(report: dict[str, Any]) -> Table:
    """The table for a terminal."""
    head, rows = report_rows(report)
    table = Table(title="In brackets: share of dense")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table

"""A sensitivity analysis as a table for people."""

from rich.table import Table

from hf_prune.analysis import Sensitivity

_TITLES = {
    "logit_error": ("Squared change of the logits", "{:.2e}"),
    "loss": ("Loss", "{:.4f}"),
    "accuracy": ("Accuracy", "{:.4f}"),
}
"""What a table can show, and how its figures are written."""


def sensitivity_tables(found: Sensitivity) -> list[Table]:
    """Logits, loss and accuracy as more and more of each site is masked; how criteria agree."""
    known = next(iter(found.curves.values()), {})
    tables = [_table(found, name) for name in _TITLES if name in known]
    return [*tables, _agreement(found)] if len(found.agreement) > 1 else tables


def _agreement(found: Sensitivity) -> Table:
    table = Table(title="Agreement of criteria: rank correlation of units, mean over sites")
    table.add_column("criterion")
    for name in found.agreement:
        table.add_column(name, justify="right")
    for name, others in found.agreement.items():
        table.add_row(name, *(f"{others[other]:.2f}" for other in found.agreement))
    return table


def _table(found: Sensitivity, name: str) -> Table:
    title, written = _TITLES[name]
    dense = f" (dense {written.format(found.dense[name])})" if name in found.dense else ""
    order = f"units masked in the order of {found.criterion} (their number)"
    table = Table(title=f"{title}{dense}, {order}")
    table.add_column("site")
    for fraction in found.fractions:
        table.add_column(f"{fraction:.0%} masked", justify="right")
    for site, curves in found.curves.items():
        cells = zip(curves[name], curves["masked"], strict=True)
        table.add_row(site, *(f"{written.format(value)} ({masked:.0f})" for value, masked in cells))
    return table

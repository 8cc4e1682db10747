"""A sensitivity analysis as a table for people."""

from rich.table import Table

from hf_prune.analysis import Sensitivity


def sensitivity_table(found: Sensitivity) -> Table:
    """What the logits of the model do as more and more of each site is masked."""
    table = Table(
        title=f"Squared change of the logits, units masked in the order of {found.criterion}"
    )
    table.add_column("site")
    for fraction in found.fractions:
        table.add_column(f"{fraction:.0%} masked", justify="right")
    for site, curves in found.curves.items():
        table.add_row(site, *(f"{value:.2e}" for value in curves["logit_error"]))
    return table

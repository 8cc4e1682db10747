"""How much a unit matters: one pure function each, in one dict."""

from hf_prune.criteria import obs, units
from hf_prune.criteria.registry import (
    CRITERIA,
    STATISTICS,
    Criterion,
    criterion,
    get_criterion,
    needs,
)

__all__ = [
    "CRITERIA",
    "STATISTICS",
    "Criterion",
    "criterion",
    "get_criterion",
    "needs",
    "obs",
    "units",
]

"""One linear layer re-fitted: from moments to new weights, the same on all processes."""

from collections.abc import Sequence

from torch import Tensor, nn

from hf_prune.sites import logical_weight
from hf_prune.statistics.moments import Moments, Solve, fit_checked, same_on_all, solve_towards
from hf_prune.statistics.streams import Seen

RIDGE_STEPS = (0.1, 1.0, 10.0)
"""Multiples of the ridge that held-out tokens choose from."""


def inputs_and_residual(seen: Seen) -> tuple[Tensor, Tensor]:
    """What a projection saw, and what its output was added to."""
    assert seen.inputs is not None and seen.output is not None and seen.total is not None  # noqa: S101, PT018  # the layer ran
    return seen.inputs, seen.total - seen.output.view_as(seen.total)


def fit_(
    module: nn.Module,
    moments: tuple[Moments, Moments],
    ridge: float,
    solves: Sequence[Solve] = (solve_towards,),
) -> None:
    """Re-fit a linear layer in place, the same on all processes.

    Args:
        module: with its old weights, towards which it is pulled.
        moments: of the tokens that are fitted, and of those that judge; of all processes.
        ridge: of which held-out tokens choose a tenth, itself, or ten times it.
        solves: what is fitted, one after the other.
    """
    weight = logical_weight(module).detach()
    bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
    ridges = [step * ridge for step in RIDGE_STEPS]
    for solve in solves:
        weight, bias, _ = fit_checked(*moments, weight, bias, ridges, solve)
    logical_weight(module).data.copy_(same_on_all(weight))
    if bias is not None:
        module.bias.data.copy_(same_on_all(bias))  # type: ignore[operator]  # it has one

"""How much a unit matters: one pure function each, in one dict.

A criterion sees a gate as `[U, N]` and never asks what the units are. Its keyword-only parameters
are the list of the statistics that it needs. It returns `[U]`, higher = keep, in float32 or better.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from hf_prune.errors import ConfigError
from hf_prune.recipe import did_you_mean

STATISTICS: dict[str, str] = {
    "gate_grad": "[U], mean over examples of |d loss / d gate|; needs labels",
    "projected_fisher": "[U], mean over examples of (d (v . logits) / d gate)^2, v random signs",
    "input_norm": "[U, D], root mean square over real tokens of each input of the projection",
    "generator": "a seeded torch.Generator; needs no data",
}
"""What a criterion may ask for, and what it then gets."""

Criterion = Callable[..., Tensor]

CRITERIA: dict[str, Criterion] = {}
"""Every criterion, by the name that recipes use."""


def criterion(function: Criterion) -> Criterion:
    """Register a criterion under its own name.

    Raises:
        ConfigError: when it asks for a statistic that nobody collects.
    """
    for name in needs(function):
        if name not in STATISTICS:
            raise ConfigError(f"criterion {function.__name__}: no statistic {name!r}.")
    CRITERIA[function.__name__] = function
    return function


def needs(function: Criterion) -> tuple[str, ...]:
    """The statistics that a criterion asks for: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def get_criterion(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        ConfigError: with the closest name, and all the names there are.
    """
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {name!r}{did_you_mean(name, sorted(CRITERIA))}")
    return CRITERIA[name]


@criterion
def random(weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """A uniform random number per unit: the baseline that every criterion must beat.

    Args:
        weight: `[U, N]`, of which only `U` is used.
        generator: makes the result repeatable.

    Returns:
        `[U]`, in [0, 1).
    """
    return torch.rand(weight.shape[0], generator=generator, dtype=torch.float64)


@criterion
def magnitude(weight: Tensor) -> Tensor:
    """Importance `|W|`: the mean absolute weight of a unit.

    Args:
        weight: `[U, N]`.

    Returns:
        `[U]`, in units of the weights. The mean, so that heads and neurons compare.

    Source: the L1 norm of Li et al. 2017, arXiv:1608.08710, divided by the number of weights.
    """
    return weight.float().abs().mean(dim=1)


@criterion
def magnitude_l2(weight: Tensor) -> Tensor:
    """Root mean square weight of a unit.

    Args:
        weight: `[U, N]`.

    Returns:
        `[U]`, in units of the weights. The L2 norm divided by `sqrt(N)`.
    """
    return weight.float().square().mean(dim=1).sqrt()


@criterion
def activation_norm(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """Mean of `|W| * ||x||` over the weights of a unit: small where nothing flows.

    Args:
        weight: `[U, N]` with `N = E * D`.
        input_norm: `[U, D]`.

    Returns:
        `[U]`, in units of the output of the projection.

    Source: the score of Wanda, Sun et al. 2023, arXiv:2306.11695, averaged over a unit.
    """
    units, width = input_norm.shape
    entries = weight.float().abs().view(units, -1, width)  # [U, E, D]
    return (entries * input_norm.float().unsqueeze(1)).mean(dim=(1, 2))


@criterion
def taylor(weight: Tensor, *, gate_grad: Tensor) -> Tensor:
    """Change of the loss, to first order, if a unit were zeroed.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        gate_grad: `[U]`, mean over examples of `|dL/dg|` at `g = 1`.

    Returns:
        `[U]`, in units of the loss.

    Source: Michel et al. 2019, arXiv:1905.10650; Molchanov et al. 2019, arXiv:1906.10771.
    """
    return gate_grad


@criterion
def fisher(weight: Tensor, *, projected_fisher: Tensor) -> Tensor:
    """Squared change of the logits, to first order, if a unit were zeroed. Needs no labels.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        projected_fisher: `[U]`.

    Returns:
        `[U]`, in units of squared logits: the diagonal of the gates' Gauss-Newton matrix.

    Source: the diagonal Fisher information of Kwon et al. 2022, arXiv:2204.09656, with random
        projections
    of the logits in place of labels, because a fine-tuned model is right on nearly all its own
    examples.
    """
    return projected_fisher

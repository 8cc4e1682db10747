"""Every criterion and every statistic, by name.

A criterion sees a gate as `[U, N]` and never asks what the units are. Its keyword-only parameters
are the list of the statistics that it needs. It returns a score for each unit, `[U]`, higher =
keep; or, where units are judged together, a `Ranking`. All in float32 or better.
"""

import inspect
from collections.abc import Callable

from torch import Tensor

from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import did_you_mean

STATISTICS: dict[str, str] = {
    "gate_grad": "[U], mean over examples of |d loss / d gate|; needs labels",
    "gate_grad_signed": "[U], mean over examples of d loss / d gate; needs labels",
    "gate_square": "[U], mean over examples of (d loss / d gate)^2; needs labels",
    "projected_fisher": "[U], mean over examples of (d (v . logits) / d gate)^2, v random signs",
    "projected_gate_fisher": "[U, U], the same as a full matrix",
    "weight_grad_square": "[U, N], mean over examples of (d loss / d weight)^2; needs labels",
    "input_norm": "[U, D], root mean square over real tokens of each input of the projection",
    "input_gram": "[U * D, U * D], mean over real tokens of the inputs' outer product",
    "hessian": "[U * D, U * D], sum over tokens, mean over examples, of |g|^2 x x^T, with x an "
    "input of the projection and g = d (v . logits) / d output",
    "output_gradient": "[E, E], sum over tokens of g g^T, divided by its trace",
    "label_hessian": "[U * D, U * D], as hessian, with g = d loss / d output; needs labels",
    "label_output_gradient": "[E, E], as output_gradient, of the same g; needs labels",
    "sampled_hessian": "[U * D, U * D], as hessian, with g = d log p(y) / d output, y drawn from "
    "what the model predicts",
    "sampled_output_gradient": "[E, E], as output_gradient, of the same g",
    "generator": "a seeded torch.Generator; needs no data",
}
"""What a criterion may ask for, and what it then gets."""

Criterion = Callable[..., Tensor | Ranking]

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

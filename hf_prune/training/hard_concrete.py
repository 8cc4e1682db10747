"""Hard-concrete gates: numbers in [0, 1] that are exactly 0 or 1 with some probability.

Source: Louizos et al. 2017, arXiv:1712.01312.
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""The stretch: what lies outside [0, 1] is cut off."""
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Gates for one step, `[U]`.

    Args:
        log_alpha: `[U]`, the parameter of each gate.
        noise: `[U]`, uniform in (0, 1).
    """
    logistic = noise.log() - torch.log1p(-noise)
    stretched = torch.sigmoid((logistic + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a gate is not 0, `[U]`."""
    return torch.sigmoid(log_alpha - _SHIFT)


def expected(log_alpha: Tensor) -> Tensor:
    """The gate without noise, `[U]`: what evaluation uses."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)

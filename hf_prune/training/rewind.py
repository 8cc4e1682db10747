"""Rewinding: the weights that stay go back to what they were early in training.

Source: Frankle and Carbin 2018, arXiv:1803.03635; rewinding to a later step, arXiv:1903.01611.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PREFIX = "rewind."


@torch.no_grad()
def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, on the CPU, by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def restore_(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Write the parameters of a snapshot into a model of the same shapes."""
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.copy_(kept[name])

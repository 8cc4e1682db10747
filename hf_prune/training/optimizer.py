"""What an optimizer holds of the weights: kept where masks have zeros, renewed where units went."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rebind_optimizer_(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Make an optimizer hold a model's new parameters instead of the removed ones.

    Its state is emptied.

    Args:
        optimizer: made before parameters were replaced.
        names: by `id` of each old parameter.
        model: after they were replaced.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    parameters = dict(model.named_parameters())
    for group in inner.param_groups:
        group["params"] = [
            parameters[names[id(p)]] if id(p) in names else p for p in group["params"]
        ]
    inner.state.clear()


def _swapping(optimizer: Any) -> Any:
    """The optimizer, if it writes weights between steps too; else None.

    Between steps a Trainer lets only `eval()` and `train()` of an optimizer touch the weights:
    schedule-free ones then compute them from weights of their own.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return inner if callable(getattr(inner, "eval", None)) else None


@torch.no_grad()
def mask_gradients_(optimizer: Any, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Before a step: weights that an optimizer keeps for itself do not move where masks are False.

    Optimizers without such weights are left alone: theirs are masked after the step.
    """
    if not masks or _swapping(optimizer) is None:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask.to(gradient.device), 0)


@torch.no_grad()
def mask_states_(optimizer: Any, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Where masks have changed: write zeros into the weights that an optimizer keeps for itself."""
    inner = _swapping(optimizer)
    if not masks or inner is None:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        for value in inner.state.get(parameters[name], {}).values():
            own = isinstance(value, Tensor) and value.is_floating_point()
            if own and value.shape == mask.shape:
                value.masked_fill_(~mask.to(value.device), 0)

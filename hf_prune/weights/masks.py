"""Masks of single weights: made from magnitudes, written as zeros, counted."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_prune.errors import ConfigError, NumericsError, PlanError
from hf_prune.recipe import count_to_remove, did_you_mean
from hf_prune.weights.patterns import Pattern, keep, keep_of_all

Masks = dict[str, Tensor]
"""By parameter name; True = keep, in the shape of the parameter."""


def _keep_largest(scores: Tensor, removed: int) -> Tensor:
    return keep(scores.reshape(1, -1), removed, Pattern()).view(scores.shape)


def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float, solver: str = "uniform"
) -> Masks:
    """Masks that remove the smallest absolute values.

    Args:
        weights: from `find_weights`.
        sparsity: fraction of all their entries to remove, in [0, 1); rounded up to an entry.
        solver: `uniform` ranks within each matrix, `global` over all of them.

    Returns:
        Masks on the device of each weight. Equal values go in the order of their indices.

    Raises:
        ConfigError: for an unknown solver or a sparsity outside [0, 1).
        NumericsError: when a weight is not finite.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity={sparsity:g} is outside [0, 1). It is a fraction.")
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise NumericsError(f"{name} has values that are not finite: nothing was changed.")
    if solver == "uniform":
        return {
            name: _keep_largest(weight.detach().abs(), count_to_remove(sparsity, weight.numel()))
            for name, weight in weights.items()
        }
    if solver == "global":
        total = sum(weight.numel() for weight in weights.values())
        scores = [weight.detach().abs() for weight in weights.values()]
        masks = keep_of_all(scores, count_to_remove(sparsity, total))
        return {
            name: mask.to(weight.device)
            for (name, weight), mask in zip(weights.items(), masks, strict=True)
        }
    raise ConfigError(
        f"unknown solver {solver!r} for weights{did_you_mean(solver, WEIGHT_SOLVERS)}"
    )


WEIGHT_SOLVERS = ("global", "uniform")
"""Solvers that `magnitude_masks` can name."""


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of a weight, in bytes."""


def _fitting(parameters: Mapping[str, nn.Parameter], name: str, mask: Tensor) -> nn.Parameter:
    parameter = parameters.get(name)
    if parameter is not None and parameter.shape == mask.shape:
        return parameter
    base, _, end = name.rpartition(".")
    if f"{base}.base_layer.{end}" in parameters:
        raise PlanError(
            f"{name}: the model has adapters. They train nothing of it, so that its zeros stay: "
            "leave the masks out, and merge with merge_adapter, which keeps them."
        )
    found = "nothing" if parameter is None else list(parameter.shape)
    raise PlanError(f"{name}: the mask has shape {list(mask.shape)}, the model has {found}.")


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write exact zeros wherever a mask says that nothing stays.

    Raises:
        PlanError: when a mask has no parameter, or another shape than it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameter = _fitting(parameters, name, mask)
        parameter.masked_fill_(~mask.to(parameter.device), 0)


@dataclass
class ZeroWriter:
    """`apply_masks_` again and again, after each step of an optimizer.

    On a CPU a mask is kept as integers of the size of a weight, all bits or none, whose `and` with
    the weights costs a fifteenth of filling by a mask of bools. Elsewhere it is kept on the device.
    """

    _ready: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Write exact zeros wherever a mask says that nothing stays.

        Raises:
            PlanError: as in `apply_masks_`.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            parameter = _fitting(parameters, name, mask)
            ready = self._prepared(name, mask, parameter)
            if ready.dtype is torch.bool:
                parameter.masked_fill_(ready, 0)
            else:
                parameter.data.view(ready.dtype).bitwise_and_(ready)

    def _prepared(self, name: str, mask: Tensor, parameter: Tensor) -> Tensor:
        """What is written with, made once for each mask: True where a bool mask has zeros."""
        known = self._ready.get(name)
        if known is not None and known[0] is mask and known[1].device == parameter.device:
            return known[1]
        mine = mask.to(parameter.device)
        whole = parameter.device.type == "cpu" and parameter.is_contiguous()
        made = -mine.to(BITS[parameter.element_size()]) if whole else ~mine
        self._ready[name] = (mask, made)
        return made


def count_kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many entries stay, by name."""
    return {name: int(mask.sum()) for name, mask in masks.items()}

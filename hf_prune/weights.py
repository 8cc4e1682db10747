"""Single weights: which entries of a matrix stay, on any module, and how zeros stay zero."""

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import ConfigError, NumericsError, PlanError
from hf_prune.recipe import Prune, count_to_remove, did_you_mean

PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose `weight` can lose single entries."""

Masks = dict[str, Tensor]
"""By parameter name; True = keep, in the shape of the parameter."""


def find_weights(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, Tensor]:
    """The prunable weight matrices of any module, each shared one once.

    Args:
        model: any `nn.Module`.
        ignore: shell patterns of parameter names to leave out, such as `classifier.*`.

    Returns:
        By name, in the order of the model. A matrix that an embedding shares is left out.
    """
    taken = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, PRUNABLE):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        weight = module.weight
        if id(weight) in taken or any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
            continue
        taken.add(id(weight))
        found[name] = weight
    return found


def _keep_largest(scores: Tensor, removed: int) -> Tensor:
    """True for all but the `removed` smallest, by rank and not by threshold: the count is exact."""
    order = torch.argsort(scores.flatten(), stable=True)
    mask = torch.ones(order.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:removed]] = False
    return mask.view(scores.shape)


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
        flat = torch.cat([w.detach().abs().float().flatten().cpu() for w in weights.values()])
        mask = _keep_largest(flat, count_to_remove(sparsity, flat.numel()))
        parts = mask.split([weight.numel() for weight in weights.values()])
        return {
            name: part.view(weight.shape).to(weight.device)
            for (name, weight), part in zip(weights.items(), parts, strict=True)
        }
    raise ConfigError(
        f"unknown solver {solver!r} for weights{did_you_mean(solver, WEIGHT_SOLVERS)}"
    )


WEIGHT_SOLVERS = ("global", "uniform")
"""Solvers that stages of single weights can name."""
WEIGHT_CRITERIA = ("magnitude",)
"""Criteria that stages of single weights can name."""


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write exact zeros wherever a mask says that nothing stays.

    Raises:
        PlanError: when a mask has no parameter, or another shape than it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "nothing" if parameter is None else list(parameter.shape)
            raise PlanError(
                f"{name}: the mask has shape {list(mask.shape)}, the model has {found}."
            )
        parameter.masked_fill_(~mask.to(parameter.device), 0)


def count_kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many entries stay, by name."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def check_weight_stage(stage: Prune) -> None:
    """Refuse a criterion or solver that single weights do not have.

    Raises:
        ConfigError: with the closest name, and all the names there are.
    """
    for kind, name, known in (
        ("criterion", stage.criterion, WEIGHT_CRITERIA),
        ("solver", stage.solver, WEIGHT_SOLVERS),
    ):
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r} for weights{did_you_mean(name, known)}")

"""Models that share the tensors of another one, and what of these a plan would leave."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.plan import Plan
from hf_prune.surgery.remove import remove_units


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules and attributes anew, with the same tensors and without hooks.

    What is narrowed in it gets tensors of its own, so the given model does not change, and no
    weight is copied. Hooks are left out: what they hold (gates, a teacher) is not of the model.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            memo[id(getattr(module, name))] = OrderedDict[int, Tensor]()
    return copy.deepcopy(model, memo)


@torch.no_grad()
def survivors(model: PreTrainedModel, plan: Plan, names: Sequence[str]) -> dict[str, Tensor]:
    """Which entries of some parameters stay when a plan is carried out.

    Units are removed from a copy whose parameters hold their own positions, so this is true for
    every layout; what is not named is shared with the model.

    Args:
        model: not changed.
        plan: for its widths.
        names: of parameters.

    Returns:
        By name int64, in the shape that the parameter then has: positions in the flat one.
    """
    probe = shared_copy(model)
    for name in names:
        owner, _, last = name.rpartition(".")
        parameter = model.get_parameter(name)
        positions = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        module = probe.get_submodule(owner)
        module._parameters[last] = nn.Parameter(positions, requires_grad=False)
    remove_units(probe, plan)
    return {name: probe.get_parameter(name).long().to(model.device) for name in names}

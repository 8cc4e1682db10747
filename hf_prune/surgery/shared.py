"""A model of its own modules that shares the tensors of another one."""

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


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

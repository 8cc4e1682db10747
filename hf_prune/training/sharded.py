"""Sharded training: what works there, and what is refused.

Gates stand before modules and change no parameter, so masks and gradients of gates are exact under
FSDP2 (`torch.distributed.fsdp.fully_shard`). Removal needs whole parameters: `whole_copy` has them.
"""

from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, UnsupportedModelError


def _launched(kind: str) -> bool:
    """Whether Accelerate shards by itself: its launcher, or a plugin, says so to the Trainer."""
    if parse_flag_from_env(f"ACCELERATE_USE_{kind.upper()}"):
        return True
    return bool(is_initialized() and AcceleratorState().distributed_type == kind.upper())


def refuse_sharded(args: Any, who: str) -> None:
    """Refuse FSDP and DeepSpeed: there a process holds parts of parameters only.

    They can be asked for in the arguments of the Trainer or by `accelerate launch --use_fsdp`.

    Raises:
        ConfigError: naming the callback, what is asked for, and what to do.
    """
    for name, kind in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        if getattr(args, name, None) or _launched(kind):
            raise ConfigError(
                f"{who} does not support {kind}: it needs whole parameters, and a process "
                f"there holds parts of them. Leave {name} out, of the arguments of the Trainer "
                f"and of what `accelerate launch` is told (--use_{name}): one process and DDP "
                "(accelerate launch --multi_gpu) are supported. In a loop of your own, gates "
                "(close_gates) work under fully_shard; "
                "hf_prune.training.sharded.whole_copy then gives a model for remove_units."
            )


def whole_copy(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model, on the CPU, with the whole parameters of one that `fully_shard` has split.

    All processes must call it, and each gets a copy.

    Args:
        model: not changed.

    Raises:
        UnsupportedModelError: for a model that its config does not describe, such as one that was
            pruned before: remove units of it before it is sharded.
    """
    kinds = [
        kind
        for kind in type(model).__mro__
        if issubclass(kind, PreTrainedModel) and not issubclass(kind, FSDPModule)
    ]
    state = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in model.state_dict().items()
    }
    copy = kinds[0](model.config)
    try:
        copy.load_state_dict(state)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{kinds[0].__name__}: the config does not describe these parameters: {error}"
        ) from error
    torch.nn.Module.to(copy, model.dtype)
    copy.train(model.training)
    return copy

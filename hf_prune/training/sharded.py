"""What sharded training would need, and does not have yet."""

from typing import Any

from hf_prune.errors import ConfigError


def refuse_sharded(args: Any, who: str) -> None:
    """Refuse FSDP and DeepSpeed: there a process holds parts of parameters only.

    Raises:
        ConfigError: naming the callback.
    """
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ConfigError(f"{who} does not support FSDP or DeepSpeed yet: use one process or DDP.")

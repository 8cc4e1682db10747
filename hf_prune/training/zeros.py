"""Single weights that become zero while a model trains, and stay zero."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.recipe import Prune, did_you_mean
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import (
    WEIGHT_SOLVERS,
    Masks,
    apply_masks_,
    count_kept,
    magnitude_masks,
)

TRAINING_CRITERIA = ("magnitude",)
"""Criteria of single weights that `PruneCallback` knows."""


@dataclass
class WeightPruning:
    """The state of a stage of single weights in a running training."""

    stage: Prune
    model: nn.Module | None = None
    masks: Masks = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("criterion", self.stage.criterion, TRAINING_CRITERIA),
            ("solver", self.stage.solver, WEIGHT_SOLVERS),
        ):
            if name not in known:
                raise ConfigError(
                    f"{kind} {name!r} is not for single weights while training"
                    f"{did_you_mean(name, known)}"
                )

    def start(self, model: nn.Module) -> None:
        """Nothing is masked yet."""
        self.model, self.masks = model, {}

    def observe(self) -> None:
        """Magnitudes are in the weights themselves: nothing to collect."""

    def decide(self, share: float) -> None:
        """Choose the entries that stay at `share` of the final sparsity. Zeros never come back."""
        assert self.model is not None  # noqa: S101  # start() came first
        weights = find_weights(self.model, self.stage.ignore)
        self.masks = magnitude_masks(weights, self.stage.fraction * share, self.stage.solver)
        apply_masks_(self.model, self.masks)

    def after_step(self) -> None:
        """Write the zeros again: the optimizer has just moved them."""
        assert self.model is not None  # noqa: S101  # start() came first
        apply_masks_(self.model, self.masks)

    def before_step(self) -> None:
        """Masks hold from step to step."""

    def settle(self) -> None:
        """Nothing more to do once everything is decided."""

    def finish(self) -> None:
        """The zeros are in the weights already."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What must survive a restart."""
        return {}, dict(self.masks)

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: when a mask there does not fit this model.
        """
        assert self.model is not None  # noqa: S101  # start() came first
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        masks = {name: mask for name, mask in tensors.items() if name in shapes}
        for name, mask in masks.items():
            if mask.shape != shapes[name] or mask.dtype != torch.bool:
                raise CheckpointError(f"the mask of {name} does not fit this model.")
        self.masks = {name: mask.to(self._device()) for name, mask in masks.items()}
        apply_masks_(self.model, self.masks)

    def _device(self) -> torch.device:
        assert self.model is not None  # noqa: S101  # start() came first
        return next(self.model.parameters()).device

    def kept(self) -> dict[str, int]:
        """Entries kept, for logs."""
        return {"weights": sum(count_kept(self.masks).values())}


class KeepZeros(TrainerCallback):
    """Keeps single weights at exactly zero while any Trainer trains, whatever its optimizer.

    Args:
        masks: by parameter name, True = keep; `compress(...).masks`, or from `magnitude_masks`.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the zeros."""
        apply_masks_(kwargs["model"], self.masks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them again."""
        apply_masks_(kwargs["model"], self.masks)

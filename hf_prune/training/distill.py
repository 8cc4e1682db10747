"""`DistillCallback`: the dense model teaches the pruned one, inside any Trainer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from hf_prune.errors import ConfigError
from hf_prune.statistics.batches import counted_positions

_NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "use_cache")


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, counted: Tensor | None = None
) -> Tensor:
    """How far the student's distribution is from the teacher's.

    `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over examples (over counted
    tokens).

    Args:
        student: logits, `[B, C]` or `[B, T, C]`.
        teacher: logits of the same shape.
        temperature: `T`. The square keeps gradients of the same size for every `T`.
        counted: `[B, T]`, True where a token counts; for logits `[B, T, C]`.

    Returns:
        A scalar, in nats.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)
    if counted is not None:
        divergence = divergence[counted]
    return divergence.mean() * temperature**2


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that speaks of other classes or tokens.

    Raises:
        ConfigError: naming what differs.
    """
    for name in ("num_labels", "vocab_size"):
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ConfigError(f"{name} is {ours} in the student and {theirs} in the teacher.")


class DistillCallback(TrainerCallback):
    """Adds the loss of a teacher to that of the labels while any Trainer trains a model.

    The loss becomes `alpha * distillation + (1 - alpha) * labels`, in training only; evaluation
    reports the loss of the labels. The teacher runs in eval mode, without gradients, on the
    student's device.

    Args:
        teacher: the dense model. It is not changed and not saved.
        temperature: softens both distributions.
        alpha: share of the distillation, in [0, 1].

    Raises:
        ConfigError: when a number is out of range, or the teacher has other labels or tokens.
    """

    def __init__(
        self, teacher: PreTrainedModel, temperature: float = 2.0, alpha: float = 0.9
    ) -> None:
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ConfigError(f"temperature={temperature} must be > 0, alpha={alpha} in [0, 1].")
        self.teacher = teacher
        self.temperature = temperature
        self.alpha = alpha
        self.handle: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the teacher to the student's loss."""
        student = kwargs["model"]
        check_teacher(student, self.teacher)
        self.teacher.to(student.device).eval()
        self.handle = student.register_forward_hook(self._add_loss, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the student go."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _add_loss(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not module.training or output.loss is None:
            return output
        inputs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_THE_TEACHER}
        with torch.no_grad():
            teacher = self.teacher(*args, **inputs).logits
        counted = None
        if output.logits.ndim == 3:
            counted = counted_positions(module, kwargs["labels"])
        distilled = distillation_loss(output.logits, teacher, self.temperature, counted)
        output["loss"] = (1 - self.alpha) * output.loss + self.alpha * distilled
        return output

"""Projections from the student's width to the teacher's, learned beside the model.

They belong neither to the model nor to the Trainer's optimizer, so that nothing of them is saved
with the model, and DistributedDataParallel need not know of them.
"""

from collections.abc import Mapping

import torch
from accelerate import PartialState
from torch import Tensor, nn

from hf_prune.statistics.collect import sum_over_processes


class Projections:
    """One linear map by name, trained by an AdamW of their own.

    Args:
        widths: by name, the widths of student and teacher. Of equal widths the map starts as the
            identity (arXiv:2204.00408), else from Xavier's distribution.
        learning_rate: constant.
        device: where they live.
        seed: of the start.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        learning_rate: float,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, Tensor] = {}
        for name, (student, teacher) in sorted(widths.items()):
            weight = torch.eye(teacher, student)
            if student != teacher:
                nn.init.xavier_uniform_(weight, generator=generator)
            self.weights[name] = weight.to(device).requires_grad_()
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()) or [torch.zeros(0)], lr=learning_rate, weight_decay=0.0
        )

    def __call__(self, name: str, hidden: Tensor) -> Tensor:
        """Hidden states `[B, T, S]` of the student in the width of the teacher, `[B, T, E]`."""
        return hidden.float() @ self.weights[name].T

    @torch.no_grad()
    def step(self) -> None:
        """Learn from the gradients of all processes; a step that overflowed is passed over."""
        world = PartialState().num_processes
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad = sum_over_processes(weight.grad) / world
        if all(
            bool(torch.isfinite(w.grad).all()) for w in self.weights.values() if w.grad is not None
        ):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, by name."""
        result = {}
        for name, weight in self.weights.items():
            result[f"{name}.weight"] = weight.detach()
            for key, value in self.optimizer.state.get(weight, {}).items():
                result[f"{name}.{key}"] = value
        return result

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"{name}.weight"])
            moments = {
                key.removeprefix(f"{name}."): value.to(weight.device)
                for key, value in tensors.items()
                if key.startswith(f"{name}.") and key != f"{name}.weight"
            }
            if moments:
                moments["step"] = moments["step"].cpu()
                self.optimizer.state[weight] = moments

"""Gates of heads and neurons: on the input of a linear layer, or on its weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_prune.gates.gate import Gates, expand_gate, gated, swapped
from hf_prune.sites import Site


class _Wide:
    """A gate with one number for each column; made once, where no gradient flows through it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.held: tuple[Tensor, int, Tensor] | None = None  # gate, its version, what it became

    def __call__(self, gate: Tensor, like: Tensor) -> Tensor:
        """`[..., U]` to `[..., U * D]`, on the device and in the dtype of `like`."""
        version = -1 if gate.is_inference() else gate._version
        if self.held is not None and self.held[0] is gate and self.held[1] == version:
            wide = self.held[2]
            if (wide.dtype, wide.device) == (like.dtype, like.device):
                return wide
        wide = expand_gate(gate.to(device=like.device, dtype=like.dtype), self.width)
        self.held = None if gate.requires_grad else (gate, version, wide)
        return wide


class _Columns(torch.autograd.Function):
    """Multiply the columns of a weight, into memory that is kept from step to step.

    Fresh memory for each step would cost ten times as much as the multiplication.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor, memory: Tensor) -> Tensor:
        """The product, which lies in `memory`."""
        ctx.save_for_backward(weight, columns)  # so that a change before backward is an error
        # not seen as a change: another call with equal weights may be waiting for its backward
        torch.mul(weight, columns, out=memory.data)
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the weight: zero in closed columns."""
        _, columns = ctx.saved_tensors
        gradient = gradients[0]
        if torch.is_grad_enabled():  # it is to be differentiated again
            return gradient * columns, None, None
        return gradient.mul_(columns), None, None  # nobody else has it


class _GatedWeight:
    """A weight with its columns multiplied, in the same memory as long as the gate is the same."""

    def __init__(self) -> None:
        self.gate: Tensor | None = None
        self.memory = torch.empty(0)

    def __call__(self, weight: Tensor, wide: Tensor, columns: Tensor) -> Tensor:
        """The product, with the graph by which gradients reach the weight.

        Args:
            weight: of the layer.
            wide: the gate, one number for each column; the same object as long as it is the same.
            columns: a view of it that multiplies the stored weight.
        """
        if wide.requires_grad or not weight.requires_grad or not torch.is_grad_enabled():
            return weight * columns
        as_before = wide is self.gate and self.memory.shape == weight.shape
        if not as_before or self.memory.dtype != weight.dtype:
            self.gate, self.memory = wide, torch.empty_like(weight, requires_grad=False)
        return _Columns.apply(weight, columns, self.memory)  # type: ignore[no-any-return]


def linear_gate(module: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """Multiply the input of a linear layer, or its weight where that is the smaller of the two.

    Both give the same output and the same gradients.
    """
    expand, product, kept = _Wide(site.gate.width), _GatedWeight(), []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        gate = gates.of(site.name, training=module.training)
        if gate is None:
            return None
        inputs, weight = args[0], module.weight  # [..., U * D]
        assert isinstance(weight, Tensor)  # noqa: S101  # what a linear layer has
        small = gate.ndim == 1 and weight.numel() < inputs.numel()
        if not small or torch.compiler.is_compiling():
            return (gated(inputs, expand(gate, inputs)), *args[1:])
        wide = expand(gate, weight)
        columns = wide.unsqueeze(1) if isinstance(module, Conv1D) else wide
        kept.append(swapped(module, "weight", lambda parameter: product(parameter, wide, columns)))
        return None

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if kept:
            module._parameters["weight"] = kept.pop()  # type: ignore[assignment]  # what it was

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]

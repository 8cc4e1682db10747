"""The gates of some sites, and what all kinds of them share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class Gates:
    """The gates of some sites. `values[name]` is `[U]` (or `[B, 1, U]`); absent = all open.

    `evaluation` takes their place in eval mode, where it names a site.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    evaluation: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def of(self, name: str, *, training: bool) -> Tensor | None:
        """The gate of a site in training or in eval mode; None where it is open."""
        gate = None if training else self.evaluation.get(name)
        return self.values.get(name) if gate is None else gate

    def remove(self) -> None:
        """Take the hooks away: the model is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def expand_gate(gate: Tensor, width: int) -> Tensor:
    """One number for each column that a unit feeds: `[..., U]` to `[..., U * D]`."""
    return gate.repeat_interleave(width, dim=-1) if width > 1 else gate


def gated(inputs: Tensor, wide: Tensor) -> Tensor:
    """Inputs `[..., U * D]` times a gate of one number for each column, or `[B, 1, U * D]`."""
    if wide.ndim > inputs.ndim or (wide.ndim > 1 and inputs.shape[0] != wide.shape[0]):
        # tokens of all examples in one row, [B * T, U * D]; or several texts of each example
        by_example = inputs.reshape(wide.shape[0], -1, inputs.shape[-1])  # [B, T, U * D]
        return (by_example * wide).view(inputs.shape)
    return inputs * wide


def swapped(module: nn.Module, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Let a module work with a value made from its parameter; the parameter is returned."""
    parameter = module._parameters[name]
    assert parameter is not None  # noqa: S101  # the site was built from it
    module._parameters[name] = make(parameter)  # type: ignore[assignment]  # until the call ends
    return parameter

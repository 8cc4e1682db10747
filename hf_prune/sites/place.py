"""One layer as a place, and what its sites have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.families.spec import Attention, Ffn, Stack
from hf_prune.sites.modules import logical_weight, projection
from hf_prune.sites.site import Site, Slice


def join(*parts: str) -> str:
    """A dotted path, of which parts may be empty."""
    return ".".join(part for part in parts if part)


@dataclass(frozen=True)
class Place:
    """One layer: where it is, its number among `depth` layers, how often a pass runs it."""

    stack: Stack
    name: str
    layer: int
    runs: int
    depth: int

    def site(
        self, root: nn.Module, spec: "Attention | Ffn", slices: Sequence[Slice], **rest: Any
    ) -> Site:
        """A site of this layer whose last slice is its gate."""
        parameters, macs = _unit_cost(root, slices)
        return Site(
            layer=self.layer,
            slices=tuple(slices),
            gate=slices[-1],
            parameters=parameters,
            macs_per_token=self.runs * macs,
            layer_module=self.name,
            sum_module=join(self.name, spec.sum) if spec.sum else "",
            runs=self.runs,
            stack=self.stack.layers,
            depth=self.depth,
            **rest,
        )


def _unit_cost(root: nn.Module, slices: Sequence[Slice]) -> tuple[int, int]:
    parameters, macs = 0, 0
    for item in slices:
        module = projection(root, item.module)
        weight = logical_weight(module)
        entries = item.width * int(weight.shape[1 - item.axis])
        macs += entries
        parameters += entries + (item.width if item.axis == 0 and module.bias is not None else 0)
    return parameters, macs

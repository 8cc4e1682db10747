"""What output projections see and give in one forward pass, call by call."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_prune.sites import Site, projection


@dataclass
class Calls:
    """What the output projection of each site saw in one forward pass, call by call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def watch(self, base: PreTrainedModel, sites: Sequence[Site], *, outputs: bool) -> None:
        """Keep the inputs of all sites, and their outputs, through which gradients will flow."""
        for site in sites:

            def keep(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = site.name
            ) -> None:
                self.inputs.setdefault(name, []).append(args[0].detach())
                if outputs:
                    if not output.requires_grad:
                        output.requires_grad_()
                    self.outputs.setdefault(name, []).append(output)

            self.handles.append(projection(base, site.gate.module).register_forward_hook(keep))

    def clear(self) -> None:
        """Forget the last pass."""
        self.inputs.clear()
        self.outputs.clear()

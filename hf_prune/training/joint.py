"""Heads and neurons, and single weights of what stays of them, in one training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.budget.selection import Selection
from hf_prune.surgery.shared import survivors
from hf_prune.training.learned import LearnedPruning
from hf_prune.training.structure import State, StructuredPruning
from hf_prune.training.zeros import WeightPruning


@dataclass
class JointPruning:
    """A stage of heads and neurons and one of single weights that tighten together.

    The sparsity of single weights is that of the matrices without what the gates have closed.
    """

    structure: StructuredPruning | LearnedPruning
    weights: WeightPruning

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which entries stay."""
        return self.weights.masks

    @property
    def selection(self) -> Selection | None:
        """What is removed of heads and neurons."""
        return self.structure.selection

    def start(self, model: PreTrainedModel) -> None:
        """Attach gates, all open; nothing is masked."""
        self.structure.start(model)
        self.weights.start(model)

    def before_step(self) -> None:
        """Draw gates that are random."""
        self.structure.before_step()

    def observe(self) -> None:
        """Read the gradients."""
        self.structure.observe()
        self.weights.observe()

    def after_step(self) -> None:
        """Write the zeros again."""
        self.structure.after_step()
        self.weights.after_step()

    def _inside(self) -> dict[str, Tensor]:
        """Entries of what the gates have not closed; nothing where they are all open."""
        model = self.structure.model
        if model is None or self.selection is None:
            return {}
        return survivors(model, self.selection.plan, list(self.weights.matrices()))

    def decide(self, share: float) -> None:
        """Close gates, then choose the single weights of what is open."""
        self.structure.decide(share)
        self.weights.inside = self._inside()
        self.weights.decide(share)

    def settle(self) -> None:
        """The last decision has been taken."""
        self.structure.settle()

    def finish(self) -> None:
        """Really remove what the gates had closed, and narrow the masks with it."""
        inside = self._inside()
        self.structure.finish()
        self.weights.masks = {
            name: mask.flatten()[inside[name]] if inside else mask
            for name, mask in self.masks.items()
        }
        self.weights.after_step()

    def kept(self) -> dict[str, int]:
        """Units and entries kept, by kind."""
        return {**self.structure.kept(), **self.weights.kept()}

    def state(self) -> State:
        """What must survive a restart."""
        parts = {"structure": self.structure.state(), "weights": self.weights.state()}
        data = {name: part[0] for name, part in parts.items()}
        tensors = {
            f"{name}/{key}": value for name, part in parts.items() for key, value in part[1].items()
        }
        return data, tensors

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, part in (("structure", self.structure), ("weights", self.weights)):
            mine = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
            part.load(data[name], mine)

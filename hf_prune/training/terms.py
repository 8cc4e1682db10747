"""The distillation loss of one batch, term by term."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from hf_prune.recipe import Distill
from hf_prune.training.losses import attention_loss, attention_maps, hidden_loss, relation_loss
from hf_prune.training.mapping import (
    Pairs,
    closest_pairs,
    last_pair,
    ordered_pairs,
    uniform_pairs,
)
from hf_prune.training.projection import Projections
from hf_prune.training.taps import Taps


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


@dataclass
class InnerTerms:
    """What is compared inside: taps on both models, the projections between them, the mapping."""

    stage: Distill
    student: Taps
    teacher: Taps
    projections: Projections
    pairs: Pairs | None = None
    last_pairs: Pairs = field(default=())

    @torch.no_grad()
    def _distances(self, mask: Tensor) -> Tensor:
        """Of each layer of the student to each of the teacher, `[S, L]`."""
        rows = []
        for i in range(self.student.layers):
            ours = self.projections("hidden", self.student.hidden[i + 1])
            theirs = (self.teacher.hidden[j + 1] for j in range(self.teacher.layers))
            rows.append(torch.stack([hidden_loss(ours, hidden, mask) for hidden in theirs]))
        return torch.stack(rows)

    def _choose(self, mask: Tensor) -> Pairs:
        sizes = self.student.layers, self.teacher.layers
        if self.pairs is not None:
            return self.pairs
        if self.stage.layers == "closest":
            return closest_pairs(self._distances(mask))
        if self.stage.layers == "ordered":
            distances = self._distances(mask)
            if PartialState().num_processes > 1:
                distances = reduce(distances, reduction="mean")
            self.pairs = ordered_pairs(distances)
        else:
            fixed: Callable[[int, int], Pairs] = (
                last_pair if self.stage.layers == "last" else uniform_pairs
            )
            self.pairs = fixed(*sizes)
        return self.pairs

    def _hidden(self, mask: Tensor) -> Tensor:
        return _mean(
            [
                hidden_loss(
                    self.projections("hidden", self.student.hidden[i + 1]),
                    self.teacher.hidden[j + 1],
                    mask,
                )
                for i, j in self.last_pairs
            ]
        )

    def _embeddings(self, mask: Tensor) -> Tensor:
        ours = self.projections("embeddings", self.student.hidden[0])
        return hidden_loss(ours, self.teacher.hidden[0], mask)

    def _both(self, part: str) -> list[tuple[int, int]]:
        """Pairs of layers that both still have attention."""
        ours, theirs = self.student.parts, self.teacher.parts
        return [(i, j) for i, j in self.last_pairs if (i, part) in ours and (j, part) in theirs]

    def _attention(self, mask: Tensor) -> Tensor:
        def maps(taps: Taps, layer: int) -> Tensor:
            queries, keys = taps.heads(layer, "queries"), taps.heads(layer, "keys")
            return attention_maps(queries, keys, mask, causal=taps.causal)

        return _mean(
            [
                attention_loss(maps(self.student, i), maps(self.teacher, j), mask)
                for i, j in self._both("queries")
            ]
        )

    def _relations(self, mask: Tensor) -> Tensor:
        heads = self.stage.relation_heads
        return _mean(
            [
                relation_loss(self.student.parts[i, x], self.teacher.parts[j, x], mask, heads)
                for x in self.stage.relation_of
                for i, j in self._both(x)
            ]
        )

    def __call__(self, mask: Tensor) -> dict[str, Tensor]:
        """The terms that have a weight at any time, each a mean over real tokens, by name.

        Args:
            mask: `[B, T]`, True for real tokens.
        """
        self.last_pairs = self._choose(mask)
        terms: dict[str, Callable[[Tensor], Tensor]] = {
            "hidden": self._hidden,
            "embeddings": self._embeddings,
            "attention": self._attention,
            "relations": self._relations,
        }
        return {name: term(mask) for name, term in terms.items() if self.stage.weighs(name)}

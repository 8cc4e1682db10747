"""A ranking: in which order the units of a site go, and what has been lost at each point."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_prune.criteria.exchange import exchange


@dataclass(frozen=True)
class Ranking:
    """The order in which the units of one site go, and the error curve of that order.

    Attributes:
        order: `[U]` int64, the unit that matters least first.
        errors: `[U + 1]` float64, what is lost when the first `k` units of the order are gone, in
            the unit of the criterion. Starts at 0 and never falls.
        pairs: `[U, U]`, of which `1_S^T F 1_S` is what is lost with the set `S`, where the
            criterion knows it.
        swaps: whether units are exchanged (`criteria.exchange`) before it is said which stay. Then
            fewer units are not always a subset of more, and the errors are those before.
    """

    order: Tensor
    errors: Tensor
    pairs: Tensor | None = None
    swaps: bool = False

    def __post_init__(self) -> None:
        if self.errors.shape != (len(self.order) + 1,):
            raise ValueError("an order of U units has an error curve of U + 1 points")

    @classmethod
    def from_scores(cls, scores: Tensor) -> "Ranking":
        """The ranking of units that are judged one by one: their scores add up.

        Args:
            scores: `[U]`, higher = keep. Of equal scores the first index stays longest. A negative
                score counts as no loss.
        """
        order = torch.argsort(scores, descending=True, stable=True).flip(0)
        return cls.from_losses(order, scores[order])

    @classmethod
    def from_losses(cls, order: Tensor, losses: Tensor) -> "Ranking":
        """The ranking of an order and what each step adds, `[U]`; less than 0 counts as 0."""
        start = torch.zeros(1, dtype=torch.float64)
        errors = torch.cat([start, losses.double().cpu().clamp(min=0).cumsum(0)])
        return cls(order.cpu(), errors)

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.order)

    @property
    def losses(self) -> Tensor:
        """What each step of the order adds, `[U]`, made non-decreasing.

        So that an order by loss never takes a unit of one site before an earlier one of it.
        """
        return self.errors.diff().cummax(0).values

    @classmethod
    def with_swaps(cls, pairs: Tensor) -> "Ranking":
        """The ranking by the diagonal of `F`, whose units are exchanged by all of it.

        Args:
            pairs: `F`, `[U, U]`.
        """
        alone = cls.from_scores(pairs.diagonal().double().cpu())
        return cls(alone.order, alone.errors, pairs.double().cpu(), swaps=True)

    def times(self, factor: float) -> "Ranking":
        """The same order, with everything that is lost multiplied by a factor."""
        pairs = None if self.pairs is None else self.pairs * factor
        return replace(self, errors=self.errors * factor, pairs=pairs)

    def error_of(self, kept: int) -> float:
        """What is lost when `kept` units stay."""
        if self.swaps and self.pairs is not None:
            gone = ~self._stays(kept)
            return max(float(self.pairs[gone][:, gone].sum()), 0.0)
        return float(self.errors[self.units - kept])

    def kept(self, count: int) -> tuple[int, ...]:
        """The sorted indices of the `count` units that stay."""
        return tuple(self._stays(count).nonzero().flatten().tolist())

    def _stays(self, count: int) -> Tensor:
        stays = torch.zeros(self.units, dtype=torch.bool)
        stays[self.order[self.units - count :]] = True
        if self.swaps and self.pairs is not None:
            return ~exchange(~stays, self.pairs)
        return stays

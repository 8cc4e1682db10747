"""Exchange: units that go are swapped for units that stay, as long as less is lost together."""

import torch
from torch import Tensor

CANDIDATES = 512
"""Of units that go, and of units that stay, so many are tried at once: those most likely to win."""
SMALLEST_GAIN = 1e-12
"""Relative to what is lost, a swap that wins less is none: rounding could swap for ever."""


def _likeliest(values: Tensor, units: Tensor) -> Tensor:
    """The units with the least values."""
    return units[torch.argsort(values[units], stable=True)[:CANDIDATES]]


def exchange(gone: Tensor, matrix: Tensor) -> Tensor:
    """Which units go, as many as before, such that no swap of two lowers `1_S^T F 1_S`.

    Args:
        gone: `[U]` bool, `S` to start from.
        matrix: `F`, `[U, U]`, symmetric.

    Returns:
        `[U]` bool. Each step takes the best swap there is; with more than `CANDIDATES` units on
        either side, the best among those that win most on their own.

    Source: the rearrangement of Kwon et al. 2022, arXiv:2204.09656, which swaps greedily within a
        layer; here until nothing is won any more.
    """
    gone, matrix = gone.clone(), matrix.double()
    diagonal = matrix.diagonal()
    with_gone = matrix @ gone.double()  # what each unit shares with all that go
    for _ in range(4 * len(gone)):
        comes, goes = diagonal - 2 * with_gone, diagonal + 2 * with_gone
        back = _likeliest(comes, gone.nonzero().flatten())
        out = _likeliest(goes, (~gone).nonzero().flatten())
        if not len(back) or not len(out):
            break
        change = comes[back].unsqueeze(1) + goes[out] - 2 * matrix[back][:, out]  # [back, out]
        best = int(change.argmin())
        i, j = back[best // len(out)], out[best % len(out)]
        lost = float(with_gone[gone].sum())
        if float(change.flatten()[best]) >= -SMALLEST_GAIN * abs(lost):
            break
        gone[i], gone[j] = False, True
        with_gone = with_gone - matrix[i] + matrix[j]
    return gone

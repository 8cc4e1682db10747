"""Which layer of the teacher each layer of the student learns from."""

import torch
from torch import Tensor

Pairs = tuple[tuple[int, int], ...]
"""Layers of the student with those of the teacher, both counted from 0."""


def uniform_pairs(student: int, teacher: int) -> Pairs:
    """Each layer of the student with one of the teacher, at equal distances; last with last."""
    return tuple((i, -(-(i + 1) * teacher // student) - 1) for i in range(student))


def last_pair(student: int, teacher: int) -> Pairs:
    """The last layers alone (arXiv:2002.10957)."""
    return ((student - 1, teacher - 1),)


def closest_pairs(distances: Tensor) -> Pairs:
    """Each layer of the student with that of the teacher which it is closest to.

    Args:
        distances: `[S, L]`, of each layer of the student to each of the teacher. Of equal ones the
            lower layer is taken.

    Source: Xia et al. 2022, arXiv:2204.00408, who do it for some layers of the teacher.
    """
    return tuple((i, int(j)) for i, j in enumerate(distances.argmin(dim=1).tolist()))


def ordered_pairs(distances: Tensor) -> Pairs:
    """The assignment with the least sum of distances whose layers never go back.

    Args:
        distances: as for `closest_pairs`.
    """
    rows, columns = distances.shape
    best = distances.double().clone()  # [S, L]: least sum that ends in this pair
    came = torch.zeros(rows, columns, dtype=torch.long)
    for row in range(1, rows):
        least, where = best[row - 1].cummin(dim=0)
        best[row] += least
        came[row] = where
    column = int(best[-1].argmin())
    path = [column]
    for row in range(rows - 1, 0, -1):
        column = int(came[row, column])
        path.append(column)
    return tuple(enumerate(reversed(path)))

"""Budgets: how many entries each matrix loses, so that all of them together lose what was asked."""

from collections.abc import Sequence

from hf_prune.weights.find import Matrix
from hf_prune.weights.patterns import Pattern, removed_by

Removed = dict[str, list[int]]
"""Entries to remove from each group of each matrix, by parameter name."""


def uniform(matrices: Sequence[Matrix], sparsity: float, pattern: Pattern) -> Removed:
    """The same share of every matrix: experts and groups of convolutions count as matrices."""
    result = {}
    for matrix in matrices:
        groups, rows, columns = matrix.view(matrix.parameter).shape
        result[matrix.name] = [removed_by(pattern, (rows, columns), sparsity)] * groups
    return result

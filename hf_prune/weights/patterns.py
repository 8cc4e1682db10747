"""Patterns: which entries of a matrix may stay together. Masks come from ranks, never thresholds.

A mask is exact by construction: ties go in the order of their indices, and a count that does not
divide by the number of rows is spread over rows by the scores themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_prune.errors import ConfigError
from hf_prune.recipe import count_to_remove
from hf_prune.recipe.weights import split_pattern


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: `unstructured`, `n:m` (n of m neighbours stay) or `block` (r x c)."""

    kind: str = "unstructured"
    first: int = 0
    """n of `n:m`, rows of a block."""
    second: int = 0
    """m of `n:m`, columns of a block."""
    rows: bool = False
    """Unstructured only: rank within each row instead of the whole matrix."""

    def at(self, removed: int, shape: tuple[int, int]) -> "Pattern":
        """The pattern of a `[R, C]` matrix that loses so many entries: of `n:m`, the n that does.

        Raises:
            ConfigError: when no n of `n:m` removes as many.
        """
        if self.kind != "n:m" or removed == removed_by(self, shape, 0.0):
            return self
        for n in range(self.second, 0, -1):
            level = replace(self, first=n)
            if removed_by(level, shape, 0.0) == removed:
                return level
        raise ConfigError(f"no n of {self.second} removes {removed} entries of a matrix {shape}.")

    def __str__(self) -> str:
        mark = {"n:m": ":", "block": "x"}.get(self.kind)
        return f"{self.first}{mark}{self.second}" if mark else self.kind


def parse_pattern(text: str, *, rows: bool = False) -> Pattern:
    """A pattern from `unstructured`, `2:4` or `4x4`.

    Raises:
        ConfigError: for anything else, or an n that is not in [1, m).
    """
    try:
        kind, first, second = split_pattern(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Pattern(kind, first, second, rows=rows and kind == "unstructured")


def removed_by(pattern: Pattern, shape: tuple[int, int], sparsity: float) -> int:
    """How many entries of a `[R, C]` matrix a pattern asks to remove at a sparsity.

    Under `n:m` that is given by the pattern. A block pattern removes the fewest blocks that reach
    this count.
    """
    rows, columns = shape
    if pattern.kind != "n:m":
        return count_to_remove(sparsity, rows * columns)
    n, m = pattern.first, pattern.second
    tail = columns % m
    kept = (columns // m) * n + -(-tail * n // m)
    return rows * (columns - kept)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` smallest of each row, `[R, C]`; ties in the order of their indices."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values  # [R, 1]
    chosen = scores <= limit
    if bool((chosen.sum(dim=1) == count).all()):
        return chosen
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(chosen).scatter_(1, order, True)


def _keep_unstructured(scores: Tensor, removed: int, *, rows: bool) -> Tensor:
    if not rows:
        return ~_smallest(scores.reshape(1, -1), removed).view(scores.shape)
    each, extra = divmod(removed, scores.shape[0])
    gone = _smallest(scores, each)
    if extra:
        values, columns = scores.masked_fill(gone, torch.inf).min(dim=1)  # [R]
        chosen = values.argsort(stable=True)[:extra]
        gone[chosen, columns[chosen]] = True
    return ~gone


def _keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    rows, columns = scores.shape
    tail = columns % m
    whole = scores[:, : columns - tail].reshape(-1, m)  # [R * C / m, m]
    parts = [~_smallest(whole, m - n).view(rows, columns - tail)]
    if tail:
        parts.append(~_smallest(scores[:, columns - tail :], tail - -(-tail * n // m)))
    return torch.cat(parts, dim=1)


def blocks_of(scores: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The mean square and the number of the scores in each block, `[R / r, C / c]` both."""
    (rows, columns), r, c = scores.shape, pattern.first, pattern.second
    edges = (0, -columns % c, 0, -rows % r)

    def per_block(values: Tensor) -> Tensor:
        padded = pad(values, edges)
        grid = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c)
        return grid.sum(dim=(1, 3))

    sizes = per_block(torch.ones_like(scores))
    return per_block(scores.square()) / sizes, sizes.long()


def _keep_blocks(scores: Tensor, removed: int, pattern: Pattern, allowed: Tensor | None) -> Tensor:
    rows, columns = scores.shape
    means, sizes = blocks_of(scores, pattern)
    if allowed is not None:  # what is gone already leaves less to remove, from every block
        gone = blocks_of((~allowed).float(), pattern)[0] * sizes
        sizes, removed = sizes - gone.round().long(), max(removed - int((~allowed).sum()), 0)
    order = means.flatten().argsort(stable=True)
    total = sizes.flatten()[order].cumsum(0)
    count = int((total < removed).sum()) + 1 if removed else 0
    kept = torch.ones(means.numel(), dtype=torch.bool, device=scores.device)
    kept[order[:count]] = False
    grid = kept.view(means.shape)
    grid = grid.repeat_interleave(pattern.first, 0).repeat_interleave(pattern.second, 1)
    return grid[:rows, :columns]


def room_of(pattern: Pattern, shape: tuple[int, int]) -> int:
    """The most entries that can be asked of a `[R, C]` matrix so that one block or entry stays."""
    rows, columns = shape
    if pattern.kind == "unstructured":
        return rows * columns - 1
    return rows * columns - min(pattern.first, rows) * min(pattern.second, columns)


def keep(scores: Tensor, removed: int, pattern: Pattern, allowed: Tensor | None = None) -> Tensor:
    """The mask of a pattern that keeps the largest scores.

    Args:
        scores: `[R, C]`, not negative, finite; blocks are ranked by the mean of their squares.
        removed: entries to remove, from `removed_by`; `n:m` needs no count.
        pattern: where zeros may be.
        allowed: `[R, C]`, False where nothing may stay; these entries go first, and count as
            removed. All may stay, if it is None.

    Returns:
        `[R, C]`, True = keep.
    """
    if pattern.kind == "block":
        left = scores if allowed is None else scores * allowed
        kept = _keep_blocks(left, removed, pattern, allowed)
    else:
        left = scores if allowed is None else scores.masked_fill(~allowed, -1)
        if pattern.kind == "n:m":
            kept = _keep_n_of_m(left, pattern.first, pattern.second)
        else:
            kept = _keep_unstructured(left, removed, rows=pattern.rows)
    return kept if allowed is None else kept & allowed


def keep_of_all(scores: Sequence[Tensor], removed: int) -> list[Tensor]:
    """Masks of several tensors whose entries have one ranking, in at least float32.

    Args:
        scores: of any shapes and types; higher = keep.
        removed: entries of all tensors together.

    Returns:
        Masks in the shapes of the scores, on a CPU. Equal scores go in their order.
    """
    parts = [s if s.dtype == torch.float64 else s.float() for s in scores]
    flat = torch.cat([part.flatten().cpu() for part in parts])
    mask = keep(flat.view(1, -1), removed, Pattern()).flatten()
    pieces = mask.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

"""Budgets: how many entries each matrix loses, so that all of them together lose what was asked."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_prune.budget.knapsack import knapsack
from hf_prune.errors import ConfigError
from hf_prune.recipe import count_to_remove
from hf_prune.weights.find import Matrix
from hf_prune.weights.patterns import Pattern, blocks_of, keep_of_all, removed_by, room_of
from hf_prune.weights.problem import Options
from hf_prune.weights.sensitivity import Sensitivity, measure_sensitivity
from hf_prune.weights.solvers import Problem, wanda
from hf_prune.weights.walk import Inputs

logger = logging.getLogger(__name__)

BUDGETS = ("uniform", "global", "outliers", "knapsack")
"""Budgets that a stage of single weights can name as its solver."""
Removed = dict[str, list[int]]
"""Entries to remove from each group of each matrix, by parameter name."""

OUTLIER = 5.0
"""A score this many times the mean of its matrix is an outlier (5 to 10 in the paper)."""
OUTLIER_RANGE = 0.08
"""Sparsities differ by at most this from the mean; the figure of the paper."""
KEPT_SHARES = (2.5, 1.7, 1.3, 1.0, 0.75, 0.5, 0.3)
"""Where error curves are measured: shares of what a uniform budget keeps."""
STEPS = 8
"""Levels between two measured ones, where the log of the error is a straight line."""


def uniform(matrices: Sequence[Matrix], sparsity: float, pattern: Pattern) -> Removed:
    """The same share of every matrix: experts and groups of convolutions count as matrices."""
    result = {}
    for matrix in matrices:
        groups, rows, columns = matrix.view(matrix.parameter).shape
        result[matrix.name] = [removed_by(pattern, (rows, columns), sparsity)] * groups
    return result


def _smallest_blocks(scores: Sequence[Tensor], removed: int, pattern: Pattern) -> list[int]:
    """Entries in the blocks that go, in each tensor, where blocks of all of them are ranked."""
    pairs = [blocks_of(part.float().cpu(), pattern) for part in scores]
    means = torch.cat([mean.flatten() for mean, _ in pairs])
    sizes = torch.cat([size.flatten() for _, size in pairs])
    order = means.argsort(stable=True)
    gone = order[: int((sizes[order].cumsum(0) < removed).sum()) + 1]
    lost = torch.zeros_like(sizes)
    lost[gone] = sizes[gone]
    return [int(part.sum()) for part in lost.split([mean.numel() for mean, _ in pairs])]


def _one_ranking(matrices: Sequence[Matrix], sparsity: float, options: Options) -> Removed:
    """One ranking of all weights, or blocks, by their scores; each matrix loses its smallest."""
    parts = []
    for matrix in matrices:
        for group, weight in enumerate(matrix.view(matrix.parameter.detach())):
            parts.append(options.scores_of(matrix.name, group, weight))
    wanted = count_to_remove(sparsity, sum(part.numel() for part in parts))
    if options.pattern.kind == "block" and wanted:
        counts = _smallest_blocks(parts, wanted, options.pattern)
    else:
        counts = [int((~mask).sum()) for mask in keep_of_all(parts, wanted)]
    result, place = {}, 0
    for matrix in matrices:
        groups = matrix.view(matrix.parameter).shape[0]
        result[matrix.name] = counts[place : place + groups]
        place += groups
    return result


def _spread(matrix: Matrix, removed: int) -> list[int]:
    """A count for all groups of a matrix, spread evenly over them."""
    groups = matrix.view(matrix.parameter).shape[0]
    each, extra = divmod(removed, groups)
    return [each + (group < extra) for group in range(groups)]


def _exactly(matrices: Sequence[Matrix], counts: Mapping[str, int], total: int) -> Removed:
    """Move counts by what rounding left, largest matrix first, so that their sum is exact."""
    fixed = dict(counts)
    spare = total - sum(fixed.values())
    for matrix in sorted(matrices, key=lambda item: -item.numel):
        room = max(-fixed[matrix.name], min(spare, matrix.numel - 1 - fixed[matrix.name]))
        fixed[matrix.name] += room
        spare -= room
    return {matrix.name: _spread(matrix, fixed[matrix.name]) for matrix in matrices}


def _kept_by(matrix: Matrix, pattern: Pattern, levels: Sequence[int]) -> Tensor:
    """Entries that some n of `n:m` keep in all groups of a matrix, `[levels]`."""
    groups, rows, columns = matrix.view(matrix.parameter).shape
    gone = [removed_by(replace(pattern, first=n), (rows, columns), 0.0) for n in levels]
    return matrix.numel - groups * torch.tensor(gone)


def _chosen_levels(
    matrices: Sequence[Matrix], kept: Sequence[Tensor], errors: Sequence[Tensor], pattern: Pattern
) -> Removed:
    """What the best levels remove, of all that keep no more than n of m everywhere would."""
    budget = sum(int(_kept_by(matrix, pattern, [pattern.first])) for matrix in matrices)
    chosen = knapsack(kept, errors, budget)
    assert chosen is not None  # noqa: S101  # n of m everywhere is one of them
    return {
        m.name: _spread(m, m.numel - int(levels[level]))
        for m, levels, level in zip(matrices, kept, chosen, strict=True)
    }


def _nearest_levels(
    matrices: Sequence[Matrix], counts: Mapping[str, int], pattern: Pattern
) -> Removed:
    """The n of `n:m` of each matrix that remove nearest to some counts, by squared differences."""
    levels = range(1, pattern.second + 1)
    kept = [_kept_by(matrix, pattern, levels) for matrix in matrices]
    far = [
        (n.double() - (matrix.numel - counts[matrix.name])).square() / matrix.numel
        for matrix, n in zip(matrices, kept, strict=True)
    ]
    return _chosen_levels(matrices, kept, far, pattern)


def _by_outliers(
    matrices: Sequence[Matrix],
    sparsity: float,
    known: Mapping[str, Sensitivity],
    pattern: Pattern,
) -> Removed:
    """Less from matrices with many outliers among `|W| * norm of the input`.

    Source: OWL, Yin et al. 2023, arXiv:2310.05175, who do this for whole layers.
    """
    shares = []
    for matrix in matrices:
        weights = matrix.view(matrix.parameter.detach())
        norms = [gram.diagonal().sqrt() for gram in known[matrix.name].grams]
        scores = torch.stack([w.float().abs() * n for w, n in zip(weights, norms, strict=True)])
        shares.append(float((scores > OUTLIER * scores.mean()).float().mean()))
    low, high = min(shares), max(shares)
    scaled = [(s - low) / (high - low or 1) * 2 * OUTLIER_RANGE for s in shares]
    sizes = [matrix.numel for matrix in matrices]
    mean = sum(a * n for a, n in zip(scaled, sizes, strict=True)) / sum(sizes)
    counts = {
        m.name: int(min(max(sparsity + mean - share, 0.0), 0.999) * m.numel)
        for m, share in zip(matrices, scaled, strict=True)
    }
    if pattern.kind == "n:m":
        return _nearest_levels(matrices, counts, pattern)
    return _exactly(matrices, counts, count_to_remove(sparsity, sum(sizes)))


def _error_at(
    matrix: Matrix, removed: int, pattern: Pattern, known: Sensitivity, options: Options
) -> float:
    """The error of a matrix of which each group loses so much, times the weight of its outputs."""
    total = 0.0
    weights = matrix.view(matrix.parameter.detach())
    for weight, gram, felt in zip(weights, known.grams, known.weights, strict=True):
        damping = options.ridge * float(gram.diagonal().mean().clamp(min=1e-12))
        damped = gram + damping * torch.eye(gram.shape[0], device=gram.device)
        problem = Problem(weight.float(), damped, pattern, removed)
        total += felt * float(problem.error(wanda(problem, 8)[0]).sum())
    return max(total, 1e-30)


def _error_curve(
    matrix: Matrix, sparsity: float, known: Sensitivity, options: Options
) -> tuple[Tensor, Tensor]:
    """Entries kept `[levels]`, and what each level costs."""
    shares = [min(share * (1 - sparsity), 0.98) for share in KEPT_SHARES]
    size = matrix.numel // matrix.view(matrix.parameter).shape[0]
    points = [
        _error_at(matrix, count_to_remove(1 - share, size), options.pattern, known, options)
        for share in shares
    ]
    kept, errors = [], []
    logs = torch.tensor(points, dtype=torch.float64).log()
    for index in range(len(shares) - 1):
        for step in range(STEPS):
            part = step / STEPS
            share = shares[index] * (1 - part) + shares[index + 1] * part
            kept.append(int(share * matrix.numel))
            errors.append(float((logs[index] * (1 - part) + logs[index + 1] * part).exp()))
    return torch.tensor(kept), torch.tensor(errors, dtype=torch.float64)


def _levels_by_error(
    matrices: Sequence[Matrix], known: Mapping[str, Sensitivity], options: Options
) -> Removed:
    """The n of `n:m` of each matrix with the least sum of errors, of some around the n asked for.

    That matrices differ in how many of m they need: DominoSearch, Sun et al., NeurIPS 2021, who
    learn it while training.
    """
    pattern = options.pattern
    around = {round(share * pattern.first) for share in KEPT_SHARES}
    around |= {pattern.first + step for step in (-1, 0, 1)}
    levels = sorted({min(n, pattern.second) for n in around if n > 0})
    errors = []
    for matrix in matrices:
        _, rows, columns = matrix.view(matrix.parameter).shape
        points = []
        for n in levels:
            level = replace(pattern, first=n)
            gone = removed_by(level, (rows, columns), 0.0)
            points.append(_error_at(matrix, gone, level, known[matrix.name], options))
        errors.append(torch.tensor(points, dtype=torch.float64))
    kept = [_kept_by(matrix, pattern, levels) for matrix in matrices]
    return _chosen_levels(matrices, kept, errors, pattern)


def _by_knapsack(
    matrices: Sequence[Matrix],
    sparsity: float,
    known: Mapping[str, Sensitivity],
    options: Options,
) -> Removed:
    """The least sum of layer errors, each weighted by how much the outputs of the model feel it."""
    if options.pattern.kind == "n:m":
        return _levels_by_error(matrices, known, options)
    total = sum(matrix.numel for matrix in matrices)
    asked = count_to_remove(sparsity, total)
    curves = [_error_curve(m, sparsity, known[m.name], options) for m in matrices]
    levels = knapsack([c[0] for c in curves], [c[1] for c in curves], total - asked)
    if levels is None:
        raise ConfigError(f"sparsity={sparsity:g} is out of the range of the error curves.")
    counts = {
        m.name: m.numel - int(curve[0][level])
        for m, curve, level in zip(matrices, curves, levels, strict=True)
    }
    return _exactly(matrices, counts, asked)


def _within_room(matrices: Sequence[Matrix], removed: Removed, pattern: Pattern) -> Removed:
    """At least one block, or entry, of every matrix stays: zeros alone would end the network."""
    if pattern.kind == "n:m":
        return removed
    result, whole, emptied = dict(removed), [], []
    for matrix in matrices:
        _, rows, columns = matrix.view(matrix.parameter).shape
        room = room_of(pattern, (rows, columns))
        result[matrix.name] = [min(count, room) for count in removed[matrix.name]]
        if not room and any(removed[matrix.name]):
            whole.append(matrix.name)
        elif result[matrix.name] != removed[matrix.name]:
            emptied.append(matrix.name)
    smallest = f"one block of {pattern}" if pattern.kind == "block" else "one weight"
    if whole:
        logger.warning("no larger than %s, and left as they are: %s", smallest, ", ".join(whole))
    if emptied:
        logger.warning(
            "the budget would leave nothing of %s: %s of each stays, and less goes than was asked",
            ", ".join(emptied),
            smallest,
        )
    return result


def allot(
    model: nn.Module,
    matrices: Sequence[Matrix],
    budget: str,
    sparsity: float,
    options: Options,
    batches: Sequence[Inputs] = (),
) -> Removed:
    """Entries to remove from each matrix, in all exactly what `sparsity` asks for.

    Under `n:m` that is what n of m removes everywhere, or a little more where matrices differ in n.

    Each matrix (expert, group of a convolution) keeps one block or weight at least, so that less
    may go than was asked for.

    Args:
        model: dense, and not changed.
        matrices: from `find_matrices`.
        budget: one of `BUDGETS`.
        sparsity: fraction of all entries, in [0, 1); `n:m` says it by itself.
        options: of the stage.
        batches: read by `outliers` and `knapsack`.

    Raises:
        ConfigError: for a sparsity outside [0, 1), or a budget that the pattern has no room for.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity={sparsity:g} is outside [0, 1). It is a fraction.")
    return _within_room(
        matrices, _allot(model, matrices, budget, sparsity, options, batches), options.pattern
    )


def _allot(
    model: nn.Module,
    matrices: Sequence[Matrix],
    budget: str,
    sparsity: float,
    options: Options,
    batches: Sequence[Inputs],
) -> Removed:
    if budget == "global":
        return _one_ranking(matrices, sparsity, options)
    if options.pattern.kind == "n:m":  # which says it by itself
        sparsity = 1 - options.pattern.first / options.pattern.second
    if budget == "uniform" or sparsity == 0:
        return uniform(matrices, sparsity, options.pattern)
    if any(matrix.kind == "embedding" for matrix in matrices):
        raise ConfigError(f"solver {budget!r} has no error for embeddings: use uniform or global.")
    known = measure_sensitivity(model, matrices, batches, options.seed)
    if budget == "outliers":
        return _by_outliers(matrices, sparsity, known, options.pattern)
    return _by_knapsack(matrices, sparsity, known, options)

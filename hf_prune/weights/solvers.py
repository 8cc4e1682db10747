"""Solvers: which entries of one matrix stay, and what the rest becomes.

Each works on one layer-wise problem: minimise `tr((V - W0) H (V - W0)^T)` over the matrices `V`
that a pattern admits, `W0` the ideal dense weights and `H` the damped second moment of the inputs.
With the dense target, `W0` is what the dense network computed, fitted to the inputs that the pruned
network really has; without it, `W0` is the old weight. Nothing below knows which.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_prune.errors import NumericsError
from hf_prune.recipe.weights import ITERATIONS, PENALTY
from hf_prune.weights.patterns import Pattern, keep

BLOCK = 128
"""Columns between two choices of a mask in SparseGPT; the figure of the paper."""


@dataclass(frozen=True)
class Problem:
    """One matrix to prune: `target` is `W0`, `[R, C]`; `gram` is `H`, `[C, C]`, damped.

    `allowed`, `[R, C]`, is False where nothing may stay; None, where all may.
    """

    target: Tensor
    gram: Tensor
    pattern: Pattern
    removed: int
    allowed: Tensor | None = None

    def keep(self, scores: Tensor) -> Tensor:
        """The mask that keeps the largest scores, `[R, C]`."""
        return keep(scores, self.removed, self.pattern, self.allowed)

    def error(self, weight: Tensor) -> Tensor:
        """Mean square over tokens, in each row `[R]`, of what `weight` gets wrong."""
        gap = weight - self.target
        return ((gap @ self.gram) * gap).sum(dim=1)


def _scaled(problem: Problem) -> tuple[Problem, Tensor]:
    """The same problem in units in which every input has mean square one, and these units `[C]`."""
    units = problem.gram.diagonal().sqrt()  # [C]
    gram = problem.gram / torch.outer(units, units)
    return replace(problem, target=problem.target * units, gram=gram), units


def _factor(gram: Tensor, *, upper: bool = False) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(gram, upper=upper)
    if int(info):
        raise NumericsError(
            "the inputs of a matrix are so dependent that its moments cannot be inverted: "
            "raise ridge, or calibrate on more examples."
        )
    result: Tensor = factor
    return result


def _inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(_factor(gram))


def refit(problem: Problem, weight: Tensor, mask: Tensor, steps: int) -> Tensor:
    """The best values on a fixed mask, by conjugate gradients from `weight`.

    The rows are independent problems; each has its own step length. Never worse than the start.

    Args:
        problem: with its damped Gram matrix.
        weight: `[R, C]`, zero where the mask is False.
        mask: `[R, C]`, True = keep.
        steps: ten are exact for our purpose where inputs are scaled.
    """
    values = weight * mask
    residual = ((problem.target - values) @ problem.gram) * mask
    direction = residual.clone()
    power = residual.square().sum(dim=1, keepdim=True)  # [R, 1]
    least = power * torch.finfo(power.dtype).eps ** 2  # below this a row is solved to rounding
    for _ in range(steps):
        image = (direction @ problem.gram) * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where((power > least) & (curvature > 0), power / curvature, 0)
        values = values + length * direction
        residual = residual - length * image
        fresh = residual.square().sum(dim=1, keepdim=True)
        direction = residual + torch.where(power > least, fresh / power, 0) * direction
        power = fresh
    return values


def project(problem: Problem, scores: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Keep the largest scores, and the target's values there; then `steps` of re-fitting.

    Returns:
        Weight and mask, `[R, C]` each.
    """
    mask = problem.keep(scores)
    scaled, units = _scaled(problem)
    values = refit(scaled, scaled.target * mask, mask, steps) if steps else scaled.target * mask
    return values / units * mask, mask


def wanda(problem: Problem, steps: int) -> tuple[Tensor, Tensor]:
    """Keep the largest `|W| * norm of the input`.

    Source: Sun et al. 2023, arXiv:2306.11695, who leave the kept values alone (`steps=0`).
    """
    scores = problem.target.abs() * problem.gram.diagonal().sqrt()
    return project(problem, scores, steps)


def admm(
    problem: Problem, steps: int, *, rho: float = PENALTY, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Least squares under an L0 constraint, by ADMM, then conjugate gradients on the support.

    Inputs are scaled to mean square one, so that `rho` has no unit and the projection at the start
    is that of Wanda. A result whose error is not below that start's gives way to it.

    Sources: Boza 2024, arXiv:2401.02938, and ALPS, Meng et al. 2024, arXiv:2406.07831; our
    iterations are fewer, at one penalty, since what they leave is taken by the final steps.
    """
    scaled, units = _scaled(problem)
    start = scaled.keep(scaled.target.abs())
    identity = torch.eye(scaled.gram.shape[0], dtype=scaled.gram.dtype, device=scaled.gram.device)
    inverse = _inverse(scaled.gram + rho * identity)
    pull = scaled.target @ scaled.gram
    sparse, dual = scaled.target * start, torch.zeros_like(scaled.target)
    mask = start
    for _ in range(iterations):
        free = (pull + rho * (sparse - dual)) @ inverse + dual
        mask = scaled.keep(free.abs())
        sparse = free * mask
        dual = free - sparse
    values = refit(scaled, sparse, mask, steps)
    first = scaled.target * start
    if float(scaled.error(values).sum()) > float(scaled.error(first).sum()):
        values, mask = refit(scaled, first, start, steps), start
    return values / units * mask, mask


def _columns(problem: Problem, block: int) -> list[int]:
    """Where SparseGPT chooses masks: multiples of `block`, and of m under `n:m`."""
    pattern, columns = problem.pattern, problem.target.shape[1]
    size = pattern.second if pattern.kind in ("n:m", "block") else block
    return list(range(0, columns, size))


def sparsegpt(problem: Problem, steps: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Column by column, each removed entry compensated by the columns to its right.

    The mask of `block` columns is chosen when they are reached, by `w^2 / [H^-1]_jj` of the
    remaining problem; counts are rounded along the columns so that their sum is exact.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    columns = problem.target.shape[1]
    upper = _factor(_inverse(problem.gram), upper=True)  # [C, C]
    weight, mask = problem.target.clone(), torch.ones_like(problem.target, dtype=torch.bool)
    starts = _columns(problem, block)
    gone = 0
    for start, end in zip(starts, [*starts[1:], columns], strict=True):
        part, factor = weight[:, start:end], upper[start:end, start:end]
        scores = part.abs() / factor.diagonal()
        wanted = max(0, problem.removed * end // columns - gone)  # a block may have gone too far
        allowed = None if problem.allowed is None else problem.allowed[:, start:end]
        chosen = keep(scores, wanted, problem.pattern, allowed)
        gone += int((~chosen).sum())
        mask[:, start:end] = chosen
        errors = torch.zeros_like(part)
        for j in range(end - start):
            errors[:, j] = part[:, j] * ~chosen[:, j] / factor[j, j]
            part[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
        weight[:, end:] -= errors @ upper[start:end, end:]
    weight = weight * mask
    if steps:
        scaled, units = _scaled(problem)
        weight = refit(scaled, weight * units, mask, steps) / units * mask
    return weight, mask


Solver = Callable[[Problem, int], tuple[Tensor, Tensor]]
SOLVERS: dict[str, Solver] = {"wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
"""By name: those that choose from the problem alone. A second argument of 0 means no re-fitting."""

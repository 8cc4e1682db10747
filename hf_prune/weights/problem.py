"""From moments to a layer-wise problem, by the criterion that a stage names, and its solution."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_prune.errors import NumericsError
from hf_prune.recipe import RIDGE
from hf_prune.recipe.weights import ITERATIONS, PENALTY, REFIT_STEPS
from hf_prune.statistics.moments import Moments, damped_cholesky, means
from hf_prune.weights.find import Matrix
from hf_prune.weights.patterns import Pattern
from hf_prune.weights.solvers import SOLVERS, Problem, admm, project

DATA_FREE = ("random", "magnitude", "magnitude_normalized", "magnitude_sigma")
"""Criteria that read nothing but the weights."""
GRADIENTS = ("sensitivity", "fisher_diagonal")
"""Criteria that read gradients, collected before the walk."""
CRITERIA = (*DATA_FREE, *GRADIENTS, *SOLVERS)
"""Criteria that a stage of single weights can name."""


def data_free_scores(criterion: str, name: str, group: int, weight: Tensor, seed: int) -> Tensor:
    """Scores `[R, C]` that need nothing but the weight; higher = keep.

    `random` is uniform in [0, 1). `magnitude` is `|w|`. `magnitude_normalized` is `|w|` as a share
    of its row plus as a share of its column (Zhang et al. 2024, arXiv:2402.04902).
    `magnitude_sigma` is `|w|` in standard deviations of the matrix (Han et al. 2015,
    arXiv:1506.02626).
    """
    size = weight.detach().float().abs()
    if criterion == "random":
        key = zlib.crc32(f"{name}/{group}".encode(), seed & 0xFFFFFFFF)
        generator = torch.Generator().manual_seed(key)
        return torch.rand(size.shape, generator=generator).to(size.device)
    if criterion == "magnitude_normalized":
        rows = size.sum(dim=1, keepdim=True).clamp(min=1e-30)
        columns = size.sum(dim=0, keepdim=True).clamp(min=1e-30)
        return size / rows + size / columns
    if criterion == "magnitude_sigma":
        return size / weight.detach().float().std().clamp(min=1e-30)
    return size


@dataclass(frozen=True)
class Options:
    """How every matrix of a stage is pruned."""

    criterion: str = "admm"
    pattern: Pattern = field(default_factory=Pattern)
    dense_target: bool = True
    refit_steps: int = REFIT_STEPS
    """Conjugate-gradient steps on the mask; 0 leaves the kept values alone."""
    ridge: float = RIDGE
    iterations: int = ITERATIONS
    penalty: float = PENALTY
    seed: int = 0
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """Of criteria that were scored before the walk, in the shape of each parameter's view."""
    earlier: Mapping[str, Tensor] = field(default_factory=dict)
    """Masks of earlier stages, in the shape of each parameter: their zeros stay zeros."""

    @property
    def needs_inputs(self) -> bool:
        """Whether anything but weights (and collected gradients) is read."""
        return self.criterion in SOLVERS or self.dense_target or self.refit_steps > 0

    @property
    def norms_only(self) -> bool:
        """Whether the norms of inputs are all that is read of them."""
        return self.criterion == "wanda" and not self.dense_target and self.refit_steps == 0

    def allowed_of(self, matrix: Matrix, group: int) -> Tensor | None:
        """Where something may stay in one group of a matrix, `[R, C]`; None, where all may."""
        mask = self.earlier.get(matrix.name)
        if mask is None:
            return None
        return matrix.view(mask)[group].to(matrix.parameter.device)

    def scores_of(self, name: str, group: int, weight: Tensor) -> Tensor:
        """Scores `[R, C]` of one matrix that need no inputs; higher = keep.

        Those that were collected, or what the criterion says of the weight; where it needs inputs,
        its magnitude.
        """
        found = self.scores.get(name)
        if found is not None:
            return found[group].to(weight.device)
        criterion = self.criterion if self.criterion in DATA_FREE else "magnitude"
        return data_free_scores(criterion, name, group, weight, self.seed)


@dataclass(frozen=True)
class Subject:
    """One matrix as it is: `weight` is `[R, C]`, `bias` is `[R]` or None.

    `on_sum` says that the targets of its moments are dense outputs `[R]` that already contain what
    the residual lost; otherwise they are dense inputs `[C]`. `allowed`, `[R, C]`, is False where
    an earlier stage has left nothing.
    """

    name: str
    group: int
    weight: Tensor
    bias: Tensor | None
    on_sum: bool = False
    allowed: Tensor | None = None


@dataclass
class Fit:
    """One pruned matrix: `[R, C]` weight and mask, bias `[R]`, and what its outputs lost.

    `error` is the mean square of that loss over the mean square of the outputs wanted.
    """

    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    error: float


def _moving(subject: Subject, options: Options) -> bool:
    """Whether the bias is fitted with the weights."""
    return subject.bias is not None and (options.dense_target or options.refit_steps > 0)


def _damped(gram: Tensor, damping: float) -> Tensor:
    """A damped Gram matrix in float32 that has a factor: with more damping, where rounding asks."""
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    damped = (gram + damping * identity).float()
    if int(torch.linalg.cholesky_ex(damped)[1]):
        damped, _, _ = damped_cholesky(gram.float(), 2 * damping)
    return damped


def make_problem(
    subject: Subject, moments: Moments, removed: int, options: Options
) -> tuple[Problem, Tensor, Tensor]:
    """The layer-wise problem of one matrix, in float32.

    Args:
        subject: the matrix as it is.
        moments: of its inputs and of the dense network's inputs (or outputs).
        removed: entries to remove; of `n:m`, as many as some n does.
        options: of which the target, the ridge and the pattern count.

    Returns:
        The problem, and the means of inputs `[C]` and of targets `[R]`, from which a bias follows.

    Raises:
        NumericsError: when inputs or targets are not finite.
    """
    gram, cross, mean_x, mean_t = means(moments, centred=_moving(subject, options))
    old = subject.weight.double()
    rows, columns = old.shape
    pattern = options.pattern.at(removed, (rows, columns))
    bias = torch.zeros_like(old[:, 0]) if subject.bias is None else subject.bias.double()
    rounding = torch.finfo(torch.float32).eps * float((gram.diagonal() + mean_x.square()).mean())
    damping = options.ridge * max(float(gram.diagonal().mean()), rounding, 1e-12)
    if not options.dense_target:
        damped = _damped(gram, damping)
        problem = Problem(old.float(), damped, pattern, removed, subject.allowed)
        return problem, mean_x, old @ mean_x + bias
    if not subject.on_sum:
        cross, mean_t = old @ cross, old @ mean_t + bias
    gram, factor, damping = damped_cholesky(gram.float(), damping)
    target = torch.cholesky_solve((cross + damping * old).float().T, factor).T
    if not torch.isfinite(target).all():
        raise NumericsError("what the dense network computed is not finite on calibration data.")
    problem = Problem(target.contiguous(), gram, pattern, removed, subject.allowed)
    return problem, mean_x, mean_t


def solve(subject: Subject, moments: Moments, removed: int, options: Options) -> Fit:
    """Prune one matrix: choose what stays, and what it becomes.

    Raises:
        NumericsError: when inputs, targets or what they give are not finite, or inputs so dependent
            that nothing can be solved, naming the parameter.
    """
    try:
        fit = _solve(subject, moments, removed, options)
    except NumericsError as error:
        raise NumericsError(f"{subject.name}: {error}") from error
    new = (fit.weight, fit.weight if fit.bias is None else fit.bias)
    if not all(bool(torch.isfinite(values.to(subject.weight.dtype)).all()) for values in new):
        raise NumericsError(
            f"{subject.name}: what it would become is not finite in {subject.weight.dtype}, so it "
            "was left as it was. Raise ridge, or calibrate on more examples."
        )
    return fit


def _solve(subject: Subject, moments: Moments, removed: int, options: Options) -> Fit:
    problem, mean_x, mean_t = make_problem(subject, moments, removed, options)
    steps = options.refit_steps
    if options.criterion == "admm":
        new, mask = admm(problem, steps, rho=options.penalty, iterations=options.iterations)
    elif options.criterion in SOLVERS:
        new, mask = SOLVERS[options.criterion](problem, steps)
    else:
        new, mask = project(
            problem, options.scores_of(subject.name, subject.group, subject.weight), steps
        )
    wanted = ((problem.target @ problem.gram) * problem.target).sum()
    error_share = float(problem.error(new).sum() / wanted.clamp(min=1e-30))
    bias = mean_t - new.double() @ mean_x if _moving(subject, options) else None
    return Fit(new, mask, bias, error_share)

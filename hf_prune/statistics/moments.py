"""Moments of inputs and targets, streamed, and the ridge regression that they determine.

The engine of every re-fit: sums over tokens are added batch by batch, over processes if there are
many, and one damped solve towards the old weights follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor

from hf_prune.errors import NumericsError
from hf_prune.statistics.collect import sum_over_processes

MAX_DOUBLINGS = 40
"""How often the ridge is doubled before a Gram matrix is given up."""


def same_on_all(values: Tensor) -> Tensor:
    """Those of the main process: equal sums give equal solutions, but only up to rounding."""
    if PartialState().num_processes == 1:
        return values
    result = broadcast(values.contiguous())
    assert isinstance(result, Tensor)  # noqa: S101  # a tensor in, a tensor out
    return result


@dataclass
class Moments:
    """Sums over tokens of `x x^T`, `t x^T`, `x`, `t`, and the number of tokens; float64."""

    xx: Tensor
    tx: Tensor
    x: Tensor
    t: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        """Empty moments for `inputs` features and `outputs` targets."""
        shapes = ((inputs, inputs), (outputs, inputs), (inputs,), (outputs,), (1,))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    @classmethod
    def of(cls, weight: Tensor) -> "Moments":
        """Empty moments for what a weight `[outputs, inputs]` reads and gives, on its device."""
        return cls.zeros(weight.shape[1], weight.shape[0], weight.device)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add tokens: `x` is `[tokens, inputs]`, `t` is `[tokens, outputs]`."""
        x, t = x.float(), t.float()
        self.xx += x.T @ x
        self.tx += t.T @ x
        self.x += x.sum(dim=0, dtype=torch.float64)
        self.t += t.sum(dim=0, dtype=torch.float64)
        self.count += x.shape[0]

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens."""
        return Moments(
            self.xx + other.xx,
            self.tx + other.tx,
            self.x + other.x,
            self.t + other.t,
            self.count + other.count,
        )

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean squared error of `W x + b` over the tokens, less the part that no weights change.

        Args:
            weight: `[outputs, inputs]`.
            bias: `[outputs]`, or None.
        """
        weight = weight.double()
        total = ((weight @ self.xx) * weight).sum() - 2 * (weight * self.tx).sum()
        if bias is not None:
            bias = bias.double()
            total = total + 2 * bias @ (weight @ self.x) + self.count[0] * bias.square().sum()
            total = total - 2 * bias @ self.t
        return float(total / self.count.clamp(min=1)[0])

    def over_processes(self) -> "Moments":
        """The moments of all processes together."""
        parts = (self.xx, self.tx, self.x, self.t, self.count)
        return Moments(*(sum_over_processes(part) for part in parts))


def means(moments: Moments, *, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The moments as means over tokens, about zero or about their own means; float64.

    Returns:
        `E[x x^T]`, `E[t x^T]`, `E[x]`, `E[t]`.

    Raises:
        NumericsError: when inputs were not finite.
    """
    count = moments.count.clamp(min=1)
    gram, cross = moments.xx / count, moments.tx / count
    mean_x, mean_t = moments.x / count, moments.t / count
    if centred:
        gram = gram - torch.outer(mean_x, mean_x)
        cross = cross - torch.outer(mean_t, mean_x)
    if not torch.isfinite(gram.diagonal().mean()):
        raise NumericsError("the inputs of a matrix are not finite on calibration data.")
    return gram, cross, mean_x, mean_t


def damped_cholesky(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """A damped Gram matrix, its Cholesky factor, and the ridge: doubled until there is a factor.

    Raises:
        NumericsError: when there is none however large the ridge is.
    """
    for _ in range(MAX_DOUBLINGS):
        damped = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return damped, factor, ridge
        ridge *= 2
    raise NumericsError(
        "a Gram matrix stayed singular however much it was damped: are inputs finite?"
    )


def solve_towards(
    moments: Moments, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """The weights that fit the targets best, pulled towards the old ones.

    Minimises `sum ||W x + b - t||^2 + lam ||W - W0||^2` with `b` free where there is one, and
    `lam = ridge * mean(diag G)` for the (centred) Gram matrix `G`. Solved in float64.

    Args:
        moments: of all tokens.
        weight: `W0`, `[outputs, inputs]`.
        bias: `[outputs]`, or None: then nothing is centred.
        ridge: relative to the mean diagonal. It is doubled where the matrix is singular all the
            same.

    Returns:
        New weight and bias, in the dtype of the old ones.

    Raises:
        NumericsError: when inputs or targets were not finite.
    """
    gram, cross, mean_x, mean_t = means(moments, centred=bias is not None)
    diagonal = gram.diagonal().mean()
    old = weight.double()
    _, factor, damping = damped_cholesky(gram, ridge * max(float(diagonal), 1e-12))
    new = torch.cholesky_solve((cross + damping * old).T, factor).T
    if not torch.isfinite(new).all():
        raise NumericsError("the targets of a matrix are not finite.")
    new_bias = None if bias is None else (mean_t - new @ mean_x).to(bias.dtype)
    return new.to(weight.dtype), new_bias


def rescaled(
    moments: Moments, weight: Tensor, bias: Tensor | None, ridge: float, *, width: int
) -> tuple[Tensor, Tensor | None]:
    """The weights with one factor for each unit's columns, those that fit the targets best.

    Minimises `sum ||W diag(s) x + b - t||^2 + lam ||s - 1||^2` over one `s` for each unit, with `b`
    free where there is one, and `lam = ridge * mean(diag M)` for the (centred) Gram matrix `M` of
    what the units give. In float64.

    Args:
        moments: of all tokens.
        weight: `[outputs, U * D]`.
        bias: `[outputs]`, or None: then nothing is centred.
        ridge: pull towards 1.
        width: `D`, columns that one unit owns.

    Returns:
        New weight and bias, in the dtype of the old ones.

    Raises:
        NumericsError: when inputs or targets were not finite.

    Source: the mask tuning of Kwon et al. 2022, arXiv:2204.09656, with a ridge towards 1 in the
        place of their damped solver and clip, and with the bias fitted, too: what is lost on
        average is no matter of scales.
    """
    gram, cross, mean_x, mean_t = means(moments, centred=bias is not None)
    old = weight.double()
    units = old.shape[1] // width
    products = (old.T @ old) * gram  # [U * D, U * D]
    matrix = products.view(units, width, units, width).sum(dim=(1, 3))  # [U, U]
    right = (old * cross).sum(dim=0).view(units, width).sum(dim=1)  # [U]
    _, factor, damping = damped_cholesky(
        matrix, ridge * max(float(matrix.diagonal().mean()), 1e-12)
    )
    scales = torch.cholesky_solve((right + damping).unsqueeze(1), factor).squeeze(1)
    if not torch.isfinite(scales).all():
        raise NumericsError("the targets of a matrix are not finite.")
    new = old * scales.repeat_interleave(width)
    new_bias = None if bias is None else (mean_t - new @ mean_x).to(bias.dtype)
    return new.to(weight.dtype), new_bias


Solve = Callable[[Moments, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]
"""From moments, old weights, their bias and a ridge to new ones."""


def fit_checked(
    fitted: Moments,
    held_out: Moments,
    weight: Tensor,
    bias: Tensor | None,
    ridges: Sequence[float],
    solve: Solve = solve_towards,
) -> tuple[Tensor, Tensor | None, float | None]:
    """The best fit that tokens which were not fitted confirm; the old weights, if none is better.

    Args:
        fitted: moments of the tokens to fit.
        held_out: moments of the others. Without any, or with nothing else, the middle one of
            `ridges` is taken unseen.
        weight: the old one, `[outputs, inputs]`.
        bias: `[outputs]`, or None.
        ridges: to choose from, increasing; as in `solve_towards`.
        solve: what is fitted: all weights, or one factor for each unit.

    Returns:
        Weight and bias, fitted to all tokens with the chosen ridge, and that ridge; or the old ones
        and None.

    Raises:
        NumericsError: when inputs or targets were not finite.
    """
    every = fitted.plus(held_out)
    if not int(held_out.count[0]) or not int(fitted.count[0]):
        ridge = ridges[len(ridges) // 2]
        return *solve(every, weight, bias, ridge), ridge
    best, chosen = held_out.error(weight, bias), None
    for ridge in ridges:
        error = held_out.error(*solve(fitted, weight, bias, ridge))
        if error < best:
            best, chosen = error, ridge
    if chosen is None:
        return weight, bias, None
    return *solve(every, weight, bias, chosen), chosen

"""Criteria that judge units together: structured optimal brain surgeon, and the block Fisher.

When a unit goes, what stays can take over a part of its work. Structured OBS knows how large a part
from the second moments of the projection's inputs, and gives an order in which each unit is the
cheapest to lose after all before it are gone and the rest has been re-fitted.
"""

import dataclasses

import torch
from torch import Tensor

from hf_prune.criteria.ranking import Ranking
from hf_prune.criteria.registry import criterion
from hf_prune.errors import NumericsError

DAMPING = 1e-3
"""Added to the diagonal of a Hessian, relative to its mean: they are often singular."""
MAX_DOUBLINGS = 40
"""How often the damping is doubled before a Hessian is given up."""
BLOCKS = 96
"""Units that go at once: one `BLOCKS`-th of those that are left, and at least one."""
CROWDED = 0.9
"""Matrices are copied without the units that are gone, once no more than this share is left."""
SMALLEST_EIGENVALUE = 1e-9
"""Directions of the outputs with less than this share of the largest are left out."""


def damped_inverse(hessian: Tensor) -> Tensor:
    """The inverse of a positive semi-definite matrix, damped as little as needed; float64.

    Raises:
        NumericsError: when it is not finite, or stays singular.
    """
    hessian = hessian.double()
    damping = DAMPING * float(hessian.diagonal().mean()) or DAMPING
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    for _ in range(MAX_DOUBLINGS):
        factor, info = torch.linalg.cholesky_ex(hessian + damping * identity)
        if not int(info):
            return torch.cholesky_inverse(factor)
        damping *= 2
    raise NumericsError("a Hessian stayed singular however much it was damped: is it finite?")


def _root(matrix: Tensor) -> Tensor:
    """`R` of `[E, r]` with `R R^T` the given positive semi-definite `[E, E]`."""
    values, vectors = torch.linalg.eigh(matrix.double())
    large = values > SMALLEST_EIGENVALUE * values[-1].clamp(min=0)
    result: Tensor = vectors[:, large] * values[large].sqrt()
    return result


def _columns(units: Tensor, width: int) -> Tensor:
    """The columns that some units own: `[n]` to `[n * width]`."""
    steps = torch.arange(width, device=units.device)
    return (units.unsqueeze(1) * width + steps).flatten()


def _unit_errors(weight: Tensor, inverse: Tensor, width: int, alive: Tensor) -> Tensor:
    """What the removal of each unit alone would add, `[m]`.

    Args:
        weight: `[r, n * D]`.
        inverse: `[n * D, n * D]`.
        width: `D`.
        alive: `[m]`, which of the `n` units are asked about.
    """
    if width == 1:
        tiny = torch.finfo(torch.float64).tiny
        errors = weight.square().sum(dim=0) / inverse.diagonal().clamp(min=tiny)
        return errors[alive].clamp(min=0)
    units = len(inverse) // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2)  # [D, D, n]
    inverted = torch.linalg.inv(blocks.permute(2, 0, 1)[alive])  # [m, D, D]
    by_unit = weight.view(len(weight), units, width)[:, alive]  # [r, m, D]
    return torch.einsum("rmd,mde,rme->m", by_unit, inverted, by_unit).clamp(min=0)


def structured_obs(weight: Tensor, hessian: Tensor, width: int) -> Ranking:
    """The order in which units go when what stays is re-fitted after each.

    Args:
        weight: `V`, `[r, U * D]`. The error is `tr(dV H dV^T)`.
        hessian: `H`, `[U * D, U * D]`, of the inputs.
        width: `D`, columns that one unit owns.

    Returns:
        Order and error curve, in the unit of `V H V^T`. A unit with columns `S` costs
        `tr(V_S (A_SS)^-1 V_S^T)` with `A` the inverse of the damped `H` over what is left; then
        `V` and `A` are updated in closed form. While many units are left, a few go at once, the
        cheapest ones, at their exact joint error.

    Source: Hassibi and Stork 1992 for single weights; for structures Kurtic et al. 2023,
        arXiv:2302.04089. The size of the blocks is ours.
    """
    inverse, weight = damped_inverse(hessian), weight.double().clone()
    left = torch.arange(len(hessian) // width, device=hessian.device)
    alive = left  # where they stand in the matrices, from which the gone ones are taken at times
    order, losses = [], []
    while len(left):
        errors = _unit_errors(weight, inverse, width, alive)
        go = torch.argsort(errors, stable=True)[: max(1, len(left) // BLOCKS)]
        stay = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stay[go] = False
        out = _columns(alive[go], width)
        rows, removed = inverse[out], weight[:, out]
        both = torch.linalg.solve(rows[:, out], torch.cat([removed.T, rows], dim=1))
        solved, passed = both.split([len(weight), len(inverse)], dim=1)  # [out, r], [out, n * D]
        joint = (removed.T * solved).sum().clamp(min=0)
        share = errors[go] / errors[go].sum().clamp(min=torch.finfo(torch.float64).tiny)
        order.append(left[go])
        losses.append(joint * share)
        left, alive = left[stay], alive[stay]
        weight.addmm_(removed, passed, alpha=-1)
        inverse.addmm_(rows.T, passed, alpha=-1)  # nothing is left where units are gone
        if len(left) * width < CROWDED * len(inverse):
            rest = _columns(alive, width)
            weight, inverse = weight[:, rest], inverse[rest][:, rest]
            alive = torch.arange(len(left), device=left.device)
    return Ranking.from_losses(torch.cat(order), torch.cat(losses))


def _as_matrix(weight: Tensor, width: int) -> Tensor:
    """From `[U, N]` with `N = E * D` to the columns of the projection, `[E, U * D]`."""
    units, entries = weight.shape
    return weight.view(units, entries // width, width).transpose(0, 1).reshape(-1, units * width)


@criterion
def obs(weight: Tensor, *, input_gram: Tensor) -> Ranking:
    """Squared error of the projection's output, with what stays re-fitted.

    Args:
        weight: `[U, N]` with `N = E * D`.
        input_gram: `[U * D, U * D]`.

    Returns:
        Order and error curve, in squared units of the projection's output, per token.

    Source: structured OBS, Kurtic et al. 2023, arXiv:2302.04089.
    """
    width = len(input_gram) // len(weight)
    return structured_obs(_as_matrix(weight.double(), width), input_gram, width)


def _kfac(weight: Tensor, hessian: Tensor, output_gradient: Tensor) -> Ranking:
    """Structured OBS of a matrix seen through a root of the second moments of its gradients."""
    width = len(hessian) // len(weight)
    matrix = _root(output_gradient).T @ _as_matrix(weight.double(), width)  # [r, U * D]
    return structured_obs(matrix, hessian, width)


@criterion
def kfac_obs(weight: Tensor, *, hessian: Tensor, output_gradient: Tensor) -> Ranking:
    """Squared change of the logits, to first order, with what stays re-fitted. Needs no labels.

    Args:
        weight: `[U, N]` with `N = E * D`.
        hessian: `[U * D, U * D]`, of inputs weighted by how much the logits depend on each token.
        output_gradient: `[E, E]`, which directions of the output the logits depend on.

    Returns:
        Order and error curve, in squared units of the logits: one unit for every site, so that
        attention, feed-forward and layers compare.

    Source: structured OBS, arXiv:2302.04089, with the Kronecker-factored curvature of Martens and
        Grosse 2015, arXiv:1503.05671, in the place of the inputs' second moments.
    """
    return _kfac(weight, hessian, output_gradient)


@criterion
def kfac_obs_label(
    weight: Tensor, *, label_hessian: Tensor, label_output_gradient: Tensor
) -> Ranking:
    """Squared change of the loss of each example, to first order, with what stays re-fitted.

    Args:
        weight: `[U, N]` with `N = E * D`.
        label_hessian: `[U * D, U * D]`, of inputs weighted by how much the loss depends on each
            token. The loss of a sequence is the mean over its labels.
        label_output_gradient: `[E, E]`, which directions of the output the loss depends on.

    Returns:
        Order and error curve, in squared units of the loss.

    Source: as `kfac_obs`, with the empirical Fisher information of the labels: Kurtic et al. 2022,
        arXiv:2203.07259, who have it without the Kronecker factors.
    """
    return _kfac(weight, label_hessian, label_output_gradient)


@criterion
def kfac_obs_sampled(
    weight: Tensor, *, sampled_hessian: Tensor, sampled_output_gradient: Tensor
) -> Ranking:
    """Second-order change of the KL divergence, times two, with what stays re-fitted. No labels.

    Args:
        weight: `[U, N]` with `N = E * D`.
        sampled_hessian: `[U * D, U * D]`, of inputs weighted by how much the log-likelihood of
            labels that the model itself predicts depends on each token.
        sampled_output_gradient: `[E, E]`, which directions of the output it depends on.

    Returns:
        Order and error curve, in nats per example; of models that predict tokens, their sum.

    Source: as `kfac_obs`; the Fisher information by labels drawn from the model's own distribution
        is that of Martens and Grosse 2015, arXiv:1503.05671, section 5.
    """
    return _kfac(weight, sampled_hessian, sampled_output_gradient)


def _greedy(pairs: Tensor) -> Ranking:
    """The order that adds least to `1_S^T F 1_S` at each step."""
    matrix = pairs.double()
    cost = matrix.diagonal().clone()
    order, losses = [], []
    for _ in range(len(matrix)):
        unit = int(cost.argmin())
        order.append(unit)
        losses.append(float(cost[unit]))
        cost += 2 * matrix[unit]
        cost[unit] = torch.inf
    found = Ranking.from_losses(torch.tensor(order), torch.tensor(losses, dtype=torch.float64))
    return dataclasses.replace(found, pairs=pairs)


@criterion
def block_fisher(weight: Tensor, *, projected_gate_fisher: Tensor) -> Ranking:
    """Squared change of the logits if units were zeroed together, to first order. No labels.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        projected_gate_fisher: `F`, `[U, U]`.

    Returns:
        A greedy order, and `1_S^T F 1_S` over the set `S` that is gone; and `F`, for
        `solver: mask_search`.

    Source: the block-diagonal Fisher information of Kwon et al. 2022, arXiv:2204.09656, with random
        projections of the logits in place of labels.
    """
    return _greedy(projected_gate_fisher)

"""Criteria that judge each unit by itself.

Scores of units are added up by solvers, and set against what units cost, so that each is a sum over
all that a unit consists of: a head counts as many neurons as it is large.
"""

import torch
from torch import Tensor

from hf_prune.criteria.registry import criterion


@criterion
def random(weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """A uniform random number per unit: the baseline that every criterion must beat.

    Args:
        weight: `[U, N]`, of which only the shape is used.
        generator: makes the result repeatable.

    Returns:
        `[U]`, in [0, N): as much for each weight of a large unit as of a small one.
    """
    units, entries = weight.shape
    return entries * torch.rand(units, generator=generator, dtype=torch.float64)


@criterion
def random_by_weight(weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """Random, but a unit is the likelier to stay the larger its weights are.

    Args:
        weight: `[U, N]`.
        generator: makes the result repeatable.

    Returns:
        `[U]`: `E / p` would be the arrival time of unit `u` with rate `p`, its share of the L1 norm
        and `E` exponential; its inverse is returned, so that the units kept are a weighted sample
        without replacement.

    Source: weighted sampling by keys, Efraimidis and Spirakis 2006.
    """
    uniform = torch.rand(weight.shape[0], generator=generator, dtype=torch.float64)
    share = weight.double().abs().sum(dim=1).cpu()
    arrival = -torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny))
    return share / arrival


@criterion
def magnitude(weight: Tensor) -> Tensor:
    """Importance `|W|`: the L1 norm of a unit.

    Args:
        weight: `[U, N]`.

    Returns:
        `[U]`, in units of the weights.

    Source: Li et al. 2017, arXiv:1608.08710.
    """
    return weight.float().abs().sum(dim=1)


@criterion
def magnitude_l2(weight: Tensor) -> Tensor:
    """The square of the L2 norm of a unit.

    Args:
        weight: `[U, N]`.

    Returns:
        `[U]`, in squared units of the weights: squares add up over units, norms do not.
    """
    return weight.float().square().sum(dim=1)


@criterion
def magnitude_normalized(weight: Tensor) -> Tensor:
    """Importance `|W| / max |W|`: the L1 norm of a unit relative to the site's largest weight.

    Args:
        weight: `[U, N]`.

    Returns:
        `[U]`, in [0, N]: layers with large weights are not spared for that alone.
    """
    entries = weight.float().abs()
    return entries.sum(dim=1) / entries.max().clamp(min=torch.finfo(torch.float32).tiny)


@criterion
def lamp(weight: Tensor) -> Tensor:
    """Squared norm of a unit over that of all units of its site that are not smaller.

    Args:
        weight: `[U, N]`.

    Returns:
        `[U]`, in (0, 1]: the share of what is left that would go with this unit, were units removed
        from the smallest on.

    Source: Lee et al. 2021, arXiv:2010.07611, for single weights; here for whole units.
    """
    squares = weight.float().square().sum(dim=1)
    order = torch.argsort(squares, stable=True)
    left = squares[order].flip(0).cumsum(0).flip(0)  # from each unit to the largest
    result = torch.empty_like(squares)
    result[order] = squares[order] / left.clamp(min=torch.finfo(torch.float32).tiny)
    return result


@criterion
def activation_norm(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """Sum of `|W| * ||x||` over the weights of a unit: small where nothing flows.

    Args:
        weight: `[U, N]` with `N = E * D`.
        input_norm: `[U, D]`.

    Returns:
        `[U]`, in units of the output of the projection.

    Source: the score of Wanda, Sun et al. 2023, arXiv:2306.11695, summed over a unit.
    """
    units, width = input_norm.shape
    entries = weight.float().abs().view(units, -1, width)  # [U, E, D]
    return (entries * input_norm.float().unsqueeze(1)).sum(dim=(1, 2))


@criterion
def taylor(weight: Tensor, *, gate_grad: Tensor) -> Tensor:
    """Change of the loss, to first order, if a unit were zeroed.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        gate_grad: `[U]`, mean over examples of `|dL/dg|` at `g = 1`.

    Returns:
        `[U]`, in units of the loss.

    Source: Michel et al. 2019, arXiv:1905.10650; Molchanov et al. 2019, arXiv:1906.10771.
    """
    return gate_grad


@criterion
def taylor_batch(weight: Tensor, *, gate_grad_signed: Tensor) -> Tensor:
    """Change of the mean loss, to first order, if a unit were zeroed.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        gate_grad_signed: `[U]`, mean over examples of `dL/dg` at `g = 1`.

    Returns:
        `[U]`, in units of the loss. Examples that disagree cancel, unlike in `taylor`.

    Source: Molchanov et al. 2019, arXiv:1906.10771.
    """
    return gate_grad_signed.abs()


@criterion
def structural_sensitivity(weight: Tensor, *, gate_grad: Tensor) -> Tensor:
    """Sensitivity `|g| / ||g||` of a unit, relative to its whole site.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        gate_grad: `[U]`, mean over examples of `|dL/dg|` at `g = 1`.

    Returns:
        `[U]`, in [0, 1].

    Source: the normalisation by layer of Molchanov et al. 2017, arXiv:1611.06440, used for heads by
        Michel et al. 2019, arXiv:1905.10650.
    """
    norm: Tensor = gate_grad.norm()
    return gate_grad / norm.clamp(min=torch.finfo(torch.float32).tiny)


@criterion
def gradient_norm(weight: Tensor, *, weight_grad_square: Tensor) -> Tensor:
    """Squared norm of the loss's gradient with respect to a unit's weights, its mean over examples.

    Args:
        weight: `[U, N]`, not used.
        weight_grad_square: `[U, N]`.

    Returns:
        `[U]`, in squared units of the loss over those of the weights: squares add up over units.
    """
    return weight_grad_square.sum(dim=1)


@criterion
def obd(weight: Tensor, *, weight_grad_square: Tensor) -> Tensor:
    """Saliency of optimal brain damage, `h w^2 / 2`, summed over a unit's weights.

    Args:
        weight: `[U, N]`.
        weight_grad_square: `[U, N]`, the diagonal `h` of the empirical Hessian.

    Returns:
        `[U]`, in units of the loss.

    Source: LeCun et al. 1989, with the empirical Fisher information in the place of the Hessian.
    """
    return (weight.double().square() * weight_grad_square).sum(dim=1) / 2


@criterion
def fisher(weight: Tensor, *, projected_fisher: Tensor) -> Tensor:
    """Squared change of the logits, to first order, if a unit were zeroed. Needs no labels.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        projected_fisher: `[U]`.

    Returns:
        `[U]`, in units of squared logits: the diagonal of the gates' Gauss-Newton matrix.

    Source: the diagonal Fisher information of Kwon et al. 2022, arXiv:2204.09656, with random
        projections of the logits in place of labels, because a fine-tuned model is right on nearly
        all its own examples.
    """
    return projected_fisher


@criterion
def fisher_label(weight: Tensor, *, gate_square: Tensor) -> Tensor:
    """Mean squared gradient of the loss with respect to a unit's gate.

    Args:
        weight: `[U, N]`, not used: the gate's gradient has the weight in it.
        gate_square: `[U]`, mean over examples of `(dL/dg)^2` at `g = 1`.

    Returns:
        `[U]`, in squared units of the loss.

    Source: the diagonal empirical Fisher information of Kwon et al. 2022, arXiv:2204.09656.
    """
    return gate_square

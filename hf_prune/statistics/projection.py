"""Random projections of what a model says: one number per example, whose gradient is curvature."""

from typing import Any

import torch
from torch import Tensor

from hf_prune.statistics.batches import example_seed


def logits_of(output: Any) -> Tensor:
    """What a model says: its logits, start and end logits together, or its hidden states."""
    if getattr(output, "logits", None) is not None:
        result = output.logits
    elif getattr(output, "start_logits", None) is not None:
        result = torch.stack([output.start_logits, output.end_logits], dim=-1)  # [B, T, 2]
    else:
        result = output[0]
    assert isinstance(result, Tensor)  # noqa: S101  # what every model of transformers gives
    return result


def _directions(values: Tensor, generator: torch.Generator, *, language: bool) -> Tensor:
    """Random `v` for the logits of one example, in the shape of `values`, without gradient.

    Of a language model `v` has the covariance `diag(p) - p p^T`, so that the expected square of
    `v . dz` is the second-order change of the KL divergence. Otherwise `v` is random signs, less
    their mean over classes, since a constant added to all logits changes no probability.
    """
    signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8)
    signs = signs.to(values) * 2 - 1
    if language:
        root = torch.softmax(values.detach(), dim=-1).sqrt()
        signs = root * signs
        return signs - root.square() * signs.sum(dim=-1, keepdim=True)
    if values.shape[-1] > 1:
        signs = signs - signs.mean(dim=-1, keepdim=True)
    return signs


def project_logits(
    logits: Tensor, inputs: Tensor, mask: Tensor, seed: int, *, language: bool = False
) -> Tensor:
    """A random projection of the logits of each example, `[B]`, drawn from its content.

    Args:
        logits: `[B, C]`, or `[B, T, C]`, of which only real tokens count.
        inputs: `[B, T]` token ids, from which the signs are seeded.
        mask: `[B, T]`, True for real tokens.
        seed: of the whole run.
        language: whether classes are the entries of a vocabulary, most of them impossible: then
            each is weighted by its probability.

    Returns:
        `[B]`: the sum of `v * z`.
    """
    result = []
    for row in range(logits.shape[0]):
        generator = torch.Generator().manual_seed(example_seed(inputs[row], mask[row], seed))
        values = logits[row].float()
        if values.ndim == 2 and values.shape[0] == mask.shape[1]:
            values = values[mask[row]]  # [T, C] -> [real tokens, C]
        result.append((values * _directions(values, generator, language=language)).sum())
    return torch.stack(result)

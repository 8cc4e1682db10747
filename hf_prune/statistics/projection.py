"""Random projections of what a model says: one number per example, whose gradient is curvature.

Their directions are random signs, or the gradient of the log-likelihood of labels that are drawn
from what the model itself predicts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.statistics.batches import (
    Batch,
    example_seed,
    main_input,
    sequence_mask,
    token_mask,
)
from hf_prune.statistics.logits import centred, has_head, kind_of, logits_of


def _directions(values: Tensor, generator: torch.Generator, said: str, *, language: bool) -> Tensor:
    """Random `v` for the logits of one example, in the shape of `values`, without gradient.

    Of a language model `v` has the covariance `diag(p) - p p^T`, so that the expected square of
    `v . dz` is the second-order change of the KL divergence. Otherwise `v` is random signs, less
    their mean over what a softmax runs over, since a constant added to all of its logits changes no
    probability: over classes, or over the tokens in which an answer begins or ends.
    """
    signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8)
    signs = signs.to(values) * 2 - 1
    if language:
        root = torch.softmax(values.detach(), dim=-1).sqrt()
        signs = root * signs
        return signs - root.square() * signs.sum(dim=-1, keepdim=True)
    if said == "positions":  # [tokens, 2]
        return centred(signs.T, said).T
    return centred(signs, said)


def _drawn(values: Tensor, generator: torch.Generator, said: str) -> Tensor:
    """`d log p(y) / d z` for drawn `y`, in the shape of `values`, without gradient.

    Its mean over draws is 0 and its covariance the Fisher information of the logits. `y` is a class
    for each row of `[n, C]`, or a number for each class.
    """
    values = values.detach()
    if said == "numbers":  # y ~ N(z, 1)
        return torch.randn(values.shape, generator=generator).to(values)
    if said == "flags":  # one of two classes for each entry
        chance = torch.sigmoid(values)
        uniform = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        return (uniform.to(values.device) < chance.double()).to(values) - chance
    if said == "positions":  # [tokens, 2]: a token for each column
        return _drawn(values.T, generator, "classes").T
    chance = torch.softmax(values, dim=-1)
    below = chance.double().cumsum(dim=-1)
    uniform = torch.rand(values.shape[:-1], generator=generator, dtype=torch.float64)
    at = uniform.to(below.device).unsqueeze(-1) * below[..., -1:]
    label = torch.searchsorted(below, at, right=True).clamp(max=values.shape[-1] - 1)
    return torch.zeros_like(chance).scatter_(-1, label, 1.0) - chance


def project_logits(
    logits: Tensor,
    seeds: Sequence[int],
    mask: Tensor | None = None,
    *,
    said: str = "classes",
    language: bool = False,
    sampled: bool = False,
) -> Tensor:
    """A random projection of the logits of each example, `[B]`.

    Args:
        logits: `[B, C]`, or `[B, T, C]`.
        seeds: of the examples, from `example_seed`.
        mask: `[B, T]`, True for tokens that count; of logits for each token.
        said: what the logits are of, from `kind_of`.
        language: whether classes are the entries of a vocabulary, most of them impossible: then
            each is weighted by its probability.
        sampled: draw what is said, in the place of random signs.

    Returns:
        `[B]`: the sum of `v * z`.
    """
    result = []
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        values = logits[row].float()
        if mask is not None:
            values = values[mask[row]]  # [T, C] -> [tokens that count, C]
        if sampled:
            directions = _drawn(values, generator, said)
        else:
            directions = _directions(values, generator, said, language=language)
        result.append((values * directions).sum())
    return torch.stack(result)


def project_output(
    model: PreTrainedModel, batch: Batch, output: Any, seed: int, *, sampled: bool = False
) -> Tensor:
    """A random projection of what a model says of each example, `[B]`.

    The direction is drawn from the content of the example, so that it depends neither on its batch
    nor on its process. Padding does not count.

    Args:
        model: that gave the output.
        batch: on its device.
        output: with graph.
        seed: of the whole run.
        sampled: take the gradient of the log-likelihood of a drawn label of each example, or of
            each real token, in the place of random signs.

    Raises:
        ConfigError: when labels are to be drawn and the model predicts nothing.
    """
    if sampled and not has_head(output):
        raise ConfigError(
            f"{type(model).__name__} has no head, and so predicts nothing that labels could be "
            "drawn from. Load the model with the head of its task, or use criterion: kfac_obs."
        )
    logits = logits_of(output)
    rows = zip(main_input(model, batch), token_mask(model, batch), strict=True)
    seeds = [example_seed(row, real, seed) for row, real in rows]
    mask = sequence_mask(model, batch, "decoder", logits) if logits.ndim == 3 else None
    language = model.get_output_embeddings() is not None
    said = kind_of(model, output)
    return project_logits(logits, seeds, mask, said=said, language=language, sampled=sampled)

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


def logits_of(output: Any) -> Tensor:
    """What a model says: its logits, start and end logits together, or its hidden states."""
    if getattr(output, "logits", None) is not None:
        result = output.logits
    elif getattr(output, "logits_per_image", None) is not None:
        result = output.logits_per_image  # [images, texts]
    elif getattr(output, "start_logits", None) is not None:
        result = torch.stack([output.start_logits, output.end_logits], dim=-1)  # [B, T, 2]
    else:
        result = output[0]
    assert isinstance(result, Tensor)  # noqa: S101  # what every model of transformers gives
    return result


def real_logits(model: PreTrainedModel, batch: Batch, output: Any) -> Tensor:
    """What a model says of each example, or of each real token, `[n, C]`, in float32.

    Args:
        model: that gave the output.
        batch: on its device. The tokens of a decoder are real where its mask or labels say so.
        output: of the model.
    """
    values = logits_of(output).float()
    told = {"labels", "decoder_attention_mask"} & set(batch)
    if values.ndim == 3:
        decoder = bool(model.config.is_encoder_decoder) and bool(told)
        mask = (
            sequence_mask(model, batch, "decoder", values) if decoder else token_mask(model, batch)
        )
        if values.shape[:2] == mask.shape:
            return values[mask]  # [B, T, C] -> [real tokens, C]
    return values.flatten(0, -2)


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


def _said(model: PreTrainedModel, output: Any) -> str:
    """What the logits are of: `classes`, of which one is true, `flags`, `numbers`, `positions`.

    Raises:
        ConfigError: when the model predicts nothing, as one without a head.
    """
    if getattr(output, "start_logits", None) is not None:
        return "positions"
    if not any(getattr(output, n, None) is not None for n in ("logits", "logits_per_image")):
        raise ConfigError(
            f"{type(model).__name__} has no head, and so predicts nothing that labels could be "
            "drawn from. Load the model with the head of its task, or use criterion: kfac_obs."
        )
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return "flags"
    numbers = problem == "regression" or logits_of(output).shape[-1] == 1
    return "numbers" if numbers else "classes"


def project_logits(
    logits: Tensor,
    seeds: Sequence[int],
    mask: Tensor | None = None,
    *,
    language: bool = False,
    said: str | None = None,
) -> Tensor:
    """A random projection of the logits of each example, `[B]`.

    Args:
        logits: `[B, C]`, or `[B, T, C]`.
        seeds: of the examples, from `example_seed`.
        mask: `[B, T]`, True for tokens that count; of logits for each token.
        language: whether classes are the entries of a vocabulary, most of them impossible: then
            each is weighted by its probability.
        said: what is drawn, in the place of random signs: `classes`, `flags`, `numbers`, or
            `positions`.

    Returns:
        `[B]`: the sum of `v * z`.
    """
    result = []
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        values = logits[row].float()
        if mask is not None:
            values = values[mask[row]]  # [T, C] -> [tokens that count, C]
        if said is None:
            directions = _directions(values, generator, language=language)
        else:
            directions = _drawn(values, generator, said)
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
    logits = logits_of(output)
    rows = zip(main_input(model, batch), token_mask(model, batch), strict=True)
    seeds = [example_seed(row, real, seed) for row, real in rows]
    mask = sequence_mask(model, batch, "decoder", logits) if logits.ndim == 3 else None
    language = model.get_output_embeddings() is not None
    said = _said(model, output) if sampled else None
    return project_logits(logits, seeds, mask, language=language, said=said)

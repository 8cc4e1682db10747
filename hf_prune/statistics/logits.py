"""What a model says, what its logits are of, and how far another model is from saying the same.

A constant added to all logits of a softmax changes no probability. What a softmax runs over depends
on the task: classes, or the tokens in which an answer begins or ends. Flags and numbers have none.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.statistics.batches import Batch, sequence_mask, token_mask

HEADS = ("logits", "prediction_logits", "logits_per_image")
"""Where the output of a model has its logits, but for answers in a text."""


def logits_of(output: Any) -> Tensor:
    """What a model says: its logits, start and end logits together, or its hidden states."""
    found = (getattr(output, name, None) for name in HEADS)
    result = next((value for value in found if value is not None), None)
    if result is None and getattr(output, "start_logits", None) is not None:
        result = torch.stack([output.start_logits, output.end_logits], dim=-1)  # [B, T, 2]
    if result is None:
        result = output[0]
    assert isinstance(result, Tensor)  # noqa: S101  # what every model of transformers gives
    return result


def has_head(output: Any) -> bool:
    """Whether a model predicts something, and does not give hidden states alone."""
    return any(getattr(output, name, None) is not None for name in (*HEADS, "start_logits"))


def kind_of(model: PreTrainedModel, output: Any) -> str:
    """What the logits are of.

    Returns:
        `classes`, of which one is true; `flags`, each true or not; `positions` of a start and an
        end; or `numbers`, such as those of a regression, a reward, or hidden states.
    """
    if getattr(output, "start_logits", None) is not None:
        return "positions"
    if model.get_output_embeddings() is not None:
        return "classes"
    problem = getattr(model.config, "problem_type", None)
    if has_head(output) and problem == "multi_label_classification":
        return "flags"
    numbers = problem == "regression" or logits_of(output).shape[-1] == 1
    return "numbers" if numbers or not has_head(output) else "classes"


def centred(values: Tensor, kind: str, real: Tensor | None = None) -> Tensor:
    """Values less their mean over what a softmax runs over, which the model cannot tell apart.

    Args:
        values: `[n, C]`: logits, changes of logits, or directions. Of positions, `C` are tokens.
        kind: from `kind_of`.
        real: `[n, C]`, False for tokens that do not count; they become 0.
    """
    if real is not None:
        values = values.masked_fill(~real, 0.0)
    if kind in ("flags", "numbers"):
        return values
    if real is None:
        return values - values.mean(dim=-1, keepdim=True)
    means = values.sum(dim=-1, keepdim=True) / real.sum(dim=-1, keepdim=True)
    return (values - means).masked_fill(~real, 0.0)


@dataclass(frozen=True)
class Said:
    """What a model says about some examples or tokens.

    Attributes:
        values: `[n, C]`, float32. Of each example, or of each real token, its `C` classes, flags or
            numbers. Of answers in a text a row for each start and each end, over `C` tokens.
        kind: from `kind_of`.
        real: `[n, C]`, of answers: False for tokens that are padding.
    """

    values: Tensor
    kind: str
    real: Tensor | None = None

    @property
    def entries(self) -> int:
        """How many logits there are."""
        return self.values.numel() if self.real is None else int(self.real.sum())

    def centred(self) -> "Said":
        """The same with `centred` values."""
        return replace(self, values=centred(self.values, self.kind, self.real))

    def to(self, device: torch.device) -> "Said":
        """The same on a device."""
        real = None if self.real is None else self.real.to(device)
        return replace(self, values=self.values.to(device), real=real)


def said(model: PreTrainedModel, batch: Batch, output: Any) -> Said:
    """What a model says of each example, or of each real token.

    Args:
        model: that gave the output.
        batch: on its device. The tokens of a decoder are real where its mask or labels say so.
        output: of the model.
    """
    values, kind = logits_of(output).float(), kind_of(model, output)
    told = {"labels", "decoder_attention_mask"} & set(batch)
    mask = None
    if values.ndim == 3:
        decoder = bool(model.config.is_encoder_decoder) and bool(told)
        mask = (
            sequence_mask(model, batch, "decoder", values) if decoder else token_mask(model, batch)
        )
        mask = mask if mask.shape == values.shape[:2] else None
    if kind == "positions":
        if mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        keep = mask.any(dim=1)
        ends = values[keep].transpose(1, 2).flatten(0, 1)  # [B, T, 2] -> [2 B, T]
        real = mask[keep].repeat_interleave(2, dim=0)
        return Said(ends, kind, real)
    if mask is not None:
        return Said(values[mask], kind)  # [B, T, C] -> [real tokens, C]
    return Said(values.flatten(0, -2), kind)


def _pair(values: Tensor) -> Tensor:
    """Log-probabilities of flags and of their contraries, `[..., C, 2]`."""
    return F.logsigmoid(torch.stack([values, -values], dim=-1))


def divergence_over(kind: str, wanted: Tensor, other: Tensor) -> Tensor:
    """KL divergence of what logits say from what is wanted, in nats: `[..., C]` to `[...]`.

    By a softmax over the last axis; of flags by sigmoids, their sum; of numbers by normal
    distributions of variance 1: half the squared difference, its sum.

    Args:
        kind: from `kind_of`.
        wanted: logits to come near to.
        other: logits of another model.
    """
    if kind == "numbers":
        return (other - wanted).square().sum(dim=-1) / 2
    if kind == "flags":
        theirs, ours = _pair(wanted).flatten(-2), _pair(other).flatten(-2)
    else:
        theirs, ours = (torch.log_softmax(each, dim=-1) for each in (wanted, other))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)


def divergence(wanted: Said, other: Said) -> Tensor:
    """The same of each example or token, `[n]`, or of each start and end of an answer.

    Args:
        wanted: from the model to come near to.
        other: of the same batch, from another model.
    """
    if wanted.real is None:
        return divergence_over(wanted.kind, wanted.values, other.values)
    padding = ~wanted.real
    both = (each.values.masked_fill(padding, -torch.inf) for each in (wanted, other))
    theirs, ours = (torch.log_softmax(each, dim=-1).masked_fill(padding, 0.0) for each in both)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)

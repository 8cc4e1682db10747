"""What a student loses against its teacher: logits, hidden states, attention maps, relations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prune.statistics.logits import divergence_over


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    counted: Tensor | None = None,
    items: Tensor | float | None = None,
    kind: str = "classes",
) -> Tensor:
    """How far the student's distribution is from the teacher's.

    `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over examples (over counted
    tokens). Of flags by sigmoids; of numbers half the squared difference, whatever `T` is.

    Args:
        student: logits, `[B, C]` or `[B, T, C]`.
        teacher: logits of the same shape.
        temperature: `T`. The square keeps gradients of the same size for every `T`.
        counted: `[B, T]`, True where a token counts; for logits `[B, T, C]`.
        items: what the sum is divided by instead of the number of counted tokens: those of a whole
            accumulated batch, so that tokens weigh alike whatever piece of it they lie in.
        kind: what the logits are of, from `kind_of`.

    Returns:
        A scalar, in nats.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    wanted, ours = teacher.float() / temperature, student.float() / temperature
    divergence = divergence_over(kind, wanted, ours)
    if counted is not None:
        divergence = divergence[counted]
    total = divergence.sum()
    count = max(divergence.numel(), 1) if items is None else items
    return total / count * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states over real tokens.

    Args:
        student: `[B, T, E]`, already in the teacher's width.
        teacher: `[B, T, E]`.
        mask: `[B, T]`, True for real tokens.

    Source: Jiao et al. 2019, arXiv:1909.10351.
    """
    return (student.float() - teacher.float()).square().mean(dim=-1)[mask].mean()


def attention_maps(queries: Tensor, keys: Tensor, mask: Tensor, *, causal: bool) -> Tensor:
    """Logarithms of attention probabilities, without dropout.

    Args:
        queries: `[B, H, T, D]`.
        keys: `[B, K, T, D]`; under grouped queries each serves `H / K` of them in a row.
        mask: `[B, T]`, True for real tokens.
        causal: whether a token sees only itself and what is before it.

    Returns:
        `[B, H, T, T]`, float32; a large negative number where a token is not seen.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)  # [B, H, T, D]
    scores = queries.float() @ keys.float().transpose(-1, -2) / queries.shape[-1] ** 0.5
    seen = mask[:, None, None, :].expand(scores.shape)
    if causal:
        seen = seen & torch.ones_like(seen[0, 0]).tril()
    return F.log_softmax(scores.masked_fill(~seen, torch.finfo(torch.float32).min / 2), dim=-1)


def _mean_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL of `[B, H, T, T]` log-probabilities, mean over heads and over the rows of real tokens."""
    terms = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)  # [B, H, T]
    return terms.mean(dim=1)[mask].mean()


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """How far attention maps are from the teacher's: KL, mean over heads and real tokens.

    A student with another number of heads is compared by the mean map over its heads: which of its
    heads would stand for which is not known.

    Args:
        student: from `attention_maps`, `[B, H, T, T]`.
        teacher: `[B, H', T, T]`.
        mask: `[B, T]`, True for real tokens.

    Source: Wang et al. 2020, arXiv:2002.10957; the mean over heads is ours.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (
            (m.logsumexp(dim=1, keepdim=True) - torch.tensor(float(m.shape[1])).log())
            for m in (student, teacher)
        )
    return _mean_divergence(student, teacher, mask)


def relation_loss(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """How far the relations between tokens are from the teacher's: KL of `softmax(X X^T)`.

    All heads are joined and split anew into `heads` relation heads, so that student and teacher may
    have any widths. A width that does not divide is filled up with zeros, which add nothing.

    Args:
        student: queries, keys or values of one layer, `[B, T, W]`.
        teacher: the same of the teacher, `[B, T, W']`.
        mask: `[B, T]`, True for real tokens.
        heads: relation heads.

    Source: Wang et al. 2020, arXiv:2012.15828; with values and as many relation heads as attention
    heads it is the value relation of arXiv:2002.10957.
    """

    def relations(x: Tensor) -> Tensor:
        width = -(-x.shape[-1] // heads)
        x = F.pad(x, (0, heads * width - x.shape[-1]))  # [B, T, heads * width]
        split = x.unflatten(-1, (heads, width)).transpose(1, 2)  # [B, heads, T, width]
        return attention_maps(split, split, mask, causal=False)

    return _mean_divergence(relations(student), relations(teacher), mask)

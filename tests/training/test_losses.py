"""Losses of hidden states, attention maps and relations, against slow and obvious ones."""

import math

import pytest
import torch

from hf_prune.training.losses import (
    attention_loss,
    attention_maps,
    distillation_loss,
    hidden_loss,
    relation_loss,
)

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def loop_map(queries, keys, mask, causal):
    """Probabilities of one head, `[T][T]`, row by row."""
    rows = []
    for t, query in enumerate(queries.tolist()):
        seen = [s for s in range(len(mask)) if mask[s] and (s <= t or not causal)]
        raw = [
            sum(a * b for a, b in zip(query, keys[s].tolist(), strict=True)) / len(query) ** 0.5
            for s in seen
        ]
        found = dict(zip(seen, softmax(raw), strict=True))
        rows.append([found.get(s, 0.0) for s in range(len(mask))])
    return rows


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_maps(causal, groups):
    queries, keys = draw(2, 4, 4, 3), draw(2, 4 // groups, 4, 3, seed=1)
    found = attention_maps(queries, keys, MASK, causal=causal).exp()
    for b in range(2):
        for h in range(4):
            expected = loop_map(queries[b, h], keys[b, h // groups], MASK[b], causal)
            torch.testing.assert_close(found[b, h], torch.tensor(expected), atol=1e-6, rtol=0)


def loss_by_hand(student, teacher):
    rows = []
    for b in range(2):
        for t in range(4):
            if MASK[b, t]:
                heads = range(student.shape[1])
                each = [
                    divergence(teacher[b, h, t].tolist(), student[b, h, t].tolist()) for h in heads
                ]
                rows.append(sum(each) / len(each))
    return sum(rows) / len(rows)


def test_attention_loss_by_heads_and_by_their_mean():
    ours = attention_maps(draw(2, 2, 4, 3), draw(2, 2, 4, 3, seed=1), MASK, causal=True)
    theirs = attention_maps(draw(2, 2, 4, 3, seed=2), draw(2, 2, 4, 3, seed=3), MASK, causal=True)
    expected = loss_by_hand(ours.exp(), theirs.exp())
    assert attention_loss(ours, theirs, MASK).item() == pytest.approx(expected, rel=1e-4)
    one = ours[:, :1]
    expected = loss_by_hand(one.exp(), theirs.exp().mean(dim=1, keepdim=True))
    assert attention_loss(one, theirs, MASK).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("widths", [(6, 6), (4, 6), (5, 12)])
def test_relation_loss(widths):
    ours, theirs = draw(2, 4, widths[0]), draw(2, 4, widths[1], seed=1)

    def maps(x):
        width = -(-x.shape[-1] // 2)
        heads = torch.zeros(2, 2, 4, width)
        for h in range(2):
            part = x[..., h * width : (h + 1) * width]
            heads[:, h, :, : part.shape[-1]] = part
        rows = [
            [loop_map(heads[b, h], heads[b, h], MASK[b], False) for h in range(2)] for b in range(2)
        ]
        return torch.tensor(rows)

    expected = loss_by_hand(maps(ours), maps(theirs))
    assert relation_loss(ours, theirs, MASK, 2).item() == pytest.approx(expected, rel=1e-4)
    assert relation_loss(theirs, theirs, MASK, 2).item() == pytest.approx(0, abs=1e-6)


def test_padding_is_never_counted():
    ours, theirs = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    expected = [
        (ours[b, t] - theirs[b, t]).square().mean()
        for b in range(2)
        for t in range(4)
        if MASK[b, t]
    ]
    found = hidden_loss(ours, theirs, MASK)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    relations = relation_loss(ours, theirs, MASK, 2)
    ours[~MASK] = 100.0
    theirs[~MASK] = -50.0
    torch.testing.assert_close(hidden_loss(ours, theirs, MASK), found)
    torch.testing.assert_close(relation_loss(ours, theirs, MASK, 2), relations)


def test_tokens_weigh_alike_whatever_their_batch():
    student, teacher = draw(2, 4, 5), draw(2, 4, 5, seed=1)
    whole = distillation_loss(student, teacher, 2.0, MASK)
    pieces = [
        distillation_loss(student[b : b + 1], teacher[b : b + 1], 2.0, MASK[b : b + 1], MASK.sum())
        for b in range(2)
    ]
    torch.testing.assert_close(sum(pieces), whole)

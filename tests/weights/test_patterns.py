"""Patterns: exact counts by rank, the smallest go first, ties in the order of their indices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.errors import ConfigError
from hf_prune.weights.patterns import Pattern, keep, parse_pattern, removed_by


def scores_of(seed, rows, columns, *, ties):
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (values * 3).round() if ties else values


SHAPE = {"rows": st.integers(1, 7), "columns": st.integers(1, 11)}
SPARSITY = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.9])


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 99), ties=st.booleans(), sparsity=SPARSITY, by_row=st.booleans(), **SHAPE
)
def test_unstructured_is_exact(seed, ties, sparsity, by_row, rows, columns):
    scores = scores_of(seed, rows, columns, ties=ties)
    pattern = Pattern(rows=by_row)
    removed = removed_by(pattern, (rows, columns), sparsity)
    mask = keep(scores, removed, pattern)
    assert removed == math.ceil(round(sparsity * rows * columns, 9))
    assert int((~mask).sum()) == removed
    for row in range(rows) if by_row else [slice(None)]:
        kept, gone = scores[row][mask[row]], scores[row][~mask[row]]
        if kept.numel() and gone.numel():
            assert gone.max() <= kept.min()
    if by_row:
        counts = (~mask).sum(dim=1)
        assert counts.max() - counts.min() <= 1


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 99), ties=st.booleans(), m=st.integers(2, 6), n=st.integers(1, 5), **SHAPE
)
def test_n_of_m_neighbours_stay(seed, ties, m, n, rows, columns):
    n = min(n, m - 1)
    scores = scores_of(seed, rows, columns, ties=ties)
    mask = keep(scores, 0, Pattern("n:m", n, m))
    for row in range(rows):
        for start in range(0, columns, m):
            part, values = mask[row, start : start + m], scores[row, start : start + m]
            assert int(part.sum()) == math.ceil(n * len(part) / m)
            order = sorted(range(len(part)), key=lambda i: (float(values[i]), i))  # used here only
            gone = order[: len(part) - int(part.sum())]
            assert sorted(gone) == (~part).nonzero().flatten().tolist()
    assert int((~mask).sum()) == removed_by(Pattern("n:m", n, m), (rows, columns), 0.3)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 99), sparsity=SPARSITY, r=st.integers(1, 4), c=st.integers(1, 4), **SHAPE
)
def test_blocks_go_whole_and_the_fewest(seed, sparsity, r, c, rows, columns):
    scores = scores_of(seed, rows, columns, ties=False)
    pattern = Pattern("block", r, c)
    removed = removed_by(pattern, (rows, columns), sparsity)
    mask = keep(scores, removed, pattern)
    gone, kept = [], []
    for i in range(0, rows, r):
        for j in range(0, columns, c):
            part = mask[i : i + r, j : j + c]
            assert part.all() or not part.any()
            mean = float(scores[i : i + r, j : j + c].square().mean())
            (kept if part.all() else gone).append((mean, part.numel()))
    assert sum(size for _, size in gone) >= removed
    if gone:
        largest = max(gone)
        assert sum(size for _, size in gone) - largest[1] < removed, "one block fewer is too few"
        assert not kept or largest[0] <= min(kept)[0] + 1e-6


def test_ties_go_in_the_order_of_their_indices():
    ones = torch.ones(2, 4)
    assert keep(ones, 4, Pattern()).tolist() == [[False] * 4, [True] * 4]
    assert keep(ones, 3, Pattern(rows=True)).tolist() == [
        [False, False, True, True],
        [False, True, True, True],
    ]
    assert keep(ones, 0, Pattern("n:m", 2, 4)).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unstructured", Pattern()),
        ("2:4", Pattern("n:m", 2, 4)),
        ("1:16", Pattern("n:m", 1, 16)),
        ("4x1", Pattern("block", 4, 1)),
    ],
)
def test_patterns_by_name(text, expected):
    assert parse_pattern(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["2:", "0:4", "2-4", "", "4x", "2:4:8", "99999:100000"])
def test_unknown_pattern(text):
    with pytest.raises(ConfigError, match="unknown pattern"):
        parse_pattern(text)


def test_a_pattern_that_removes_nothing():
    with pytest.raises(ConfigError, match="'4:4' keeps 4 of 4: nothing would go"):
        parse_pattern("4:4")


@pytest.mark.parametrize("text", ["unstructured", "2:4", "2x2"])
@pytest.mark.parametrize("rows", [False, True])
def test_what_is_gone_already_goes_first(text, rows):
    """It counts as removed: nothing more goes than is asked, nothing comes back."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(8, 12, generator=generator)
    allowed = keep(torch.rand(8, 12, generator=generator), 24, Pattern(rows=True))
    pattern = parse_pattern(text, rows=rows and text == "unstructured")
    for removed in (10, 24, 60):
        mask = keep(scores, removed, pattern, allowed)
        assert not (mask & ~allowed).any()
        gone = int((~mask).sum())
        if text != "2:4":
            assert max(removed, 24) <= gone < max(removed, 24) + 4
            assert torch.equal(mask, allowed) == (removed <= 24)
    everything = torch.ones_like(allowed)
    assert torch.equal(keep(scores, 60, pattern, everything), keep(scores, 60, pattern))

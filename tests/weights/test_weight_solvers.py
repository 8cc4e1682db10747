"""Solvers against slow and obvious references, in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram

from hf_prune.weights.patterns import Pattern, keep, parse_pattern, removed_by
from hf_prune.weights.solvers import SOLVERS, Problem, admm, project, refit, sparsegpt, wanda


def problem_of(seed, rows=4, columns=8, pattern=None, sparsity=0.5, *, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    gram = inputs.T @ inputs / tokens
    gram += 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    pattern = pattern or Pattern()
    return Problem(weight, gram, pattern, removed_by(pattern, (rows, columns), sparsity))


PATTERNS = [Pattern(), Pattern(rows=True), parse_pattern("2:4"), parse_pattern("2x2")]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=["layer", "row", "2:4", "2x2"])


def slow_sparsegpt(problem, block):
    """Optimal brain surgery, one column at a time; the inverse is computed anew at every step."""
    weight, gram = problem.target.clone(), problem.gram
    rows, columns = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    size = problem.pattern.second if problem.pattern.kind != "unstructured" else block
    gone = 0
    for start in range(0, columns, size):
        end = min(start + size, columns)
        scores = torch.zeros(rows, end - start, dtype=weight.dtype)
        for j in range(start, end):  # the score of a column once those to its left are settled
            inverse = torch.linalg.inv(gram[j:, j:])
            scores[:, j - start] = weight[:, j].abs() / inverse[0, 0].sqrt()
        wanted = max(0, problem.removed * end // columns - gone)
        mask[:, start:end] = keep(scores, wanted, problem.pattern)
        gone = int((~mask[:, :end]).sum())
        for j in range(start, end):
            inverse = torch.linalg.inv(gram[j:, j:])
            for row in range(rows):
                if not mask[row, j]:
                    weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
    return weight * mask, mask


@patterns
@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_is_column_by_column_surgery(seed, block, pattern):
    problem = problem_of(seed, columns=12, pattern=pattern)
    weight, mask = sparsegpt(problem, 0, block=block)
    expected, expected_mask = slow_sparsegpt(problem, block)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight, expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    rows=st.integers(1, 6),
    columns=st.integers(2, 12),
    sparsity=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]),
    pattern=st.sampled_from(PATTERNS),
    steps=st.sampled_from([0, 2, 10]),
    iterations=st.sampled_from([0, 1, 12]),
)
def test_admm_is_never_worse_than_its_start(
    seed, rows, columns, sparsity, pattern, steps, iterations
):
    problem = problem_of(seed, rows, columns, pattern, sparsity)
    start, _ = wanda(problem, 0)  # the projection in scaled space, its values left alone
    weight, mask = admm(problem, steps, iterations=iterations)
    assert problem.error(weight).sum() <= problem.error(start).sum() * (1 + 1e-9) + 1e-12
    assert torch.equal(weight, weight * mask)
    assert int((~mask).sum()) >= problem.removed


@patterns
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_masks_are_exact_and_values_are_zero_elsewhere(name, pattern):
    problem = problem_of(3, 6, 8, pattern, 0.4)
    for steps in (0, 10):
        weight, mask = SOLVERS[name](problem, steps)
        if pattern.kind == "unstructured":
            assert int((~mask).sum()) == problem.removed
        assert not weight[~mask].any()
        assert (weight[mask] != 0).all()


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("pattern", ["8x4", "4x4", "8x1", "3x5"])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.3, 0.4, 0.7])
def test_blocks_remove_less_than_one_block_more(name, pattern, sparsity):
    """Also where a strip of columns is due less than one block."""
    told = parse_pattern(pattern)
    problem = problem_of(0, 8, 32, told, sparsity, tokens=80)
    gone = int((~SOLVERS[name](problem, 2)[1]).sum())
    assert problem.removed <= gone < problem.removed + told.first * told.second


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), sparsity=st.sampled_from([0.25, 0.5, 0.75]))
def test_refit_is_least_squares_on_the_support(seed, sparsity):
    problem = problem_of(seed, 3, 8, sparsity=sparsity)
    mask = problem.keep(problem.target.abs())
    fitted = refit(problem, problem.target, mask, steps=60)
    for row in range(3):
        on = mask[row]
        expected = torch.zeros(8, dtype=torch.float64)
        if on.any():
            right = (problem.gram @ problem.target[row])[on]
            expected[on] = torch.linalg.solve(problem.gram[on][:, on], right)
        torch.testing.assert_close(fitted[row], expected, atol=1e-5, rtol=1e-5)
    errors = [float(problem.error(refit(problem, problem.target, mask, k)).sum()) for k in range(9)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))


def test_more_steps_than_needed_do_no_harm():
    """In float32, long after nothing is left to gain."""
    exact = problem_of(1, 16, 24, sparsity=0.6, tokens=400)
    problem = Problem(exact.target.float(), exact.gram.float(), exact.pattern, exact.removed)
    scores = problem.target.abs() * problem.gram.diagonal().sqrt()
    some, many = (project(problem, scores, steps)[0] for steps in (60, 2000))
    assert torch.isfinite(many).all()
    torch.testing.assert_close(many, some, atol=1e-3, rtol=1e-3)


def test_ten_steps_are_enough_where_inputs_are_scaled():
    problem = problem_of(1, 16, 64, sparsity=0.6, tokens=400)
    scores = problem.target.abs() * problem.gram.diagonal().sqrt()
    short, long = (float(problem.error(project(problem, scores, k)[0]).sum()) for k in (10, 400))
    assert long <= short < 1.3 * long


def test_admm_against_orthogonal_matching_pursuit():
    """Sparse recovery: over many small problems our error is below that of greedy selection."""
    ours = theirs = 0.0
    for seed in range(30):
        problem = problem_of(seed, 1, 12, Pattern(rows=True), 0.5)
        weight, mask = admm(problem, 20, iterations=12)
        gram, target = problem.gram.numpy(), problem.target.numpy()[0]
        energy = np.array([target @ gram @ target])
        greedy = orthogonal_mp_gram(
            gram, gram @ target, n_nonzero_coefs=int(mask.sum()), norms_squared=energy
        )
        found = torch.from_numpy(np.asarray(greedy, dtype=np.float64).reshape(1, -1))
        ours += float(problem.error(weight).sum())
        theirs += float(problem.error(found).sum())
    assert ours < 1.1 * theirs


def test_admm_finds_a_sparse_truth():
    """Where a sparse weight explains the outputs, it is found, and greedy selection agrees."""
    problem = problem_of(5, 1, 16, Pattern(rows=True), 0.75, tokens=200)
    truth = torch.zeros(1, 16, dtype=torch.float64)
    truth[0, [1, 6, 9, 14]] = torch.tensor([2.0, -3.0, 1.5, 2.5], dtype=torch.float64)
    exact = Problem(truth, problem.gram, problem.pattern, problem.removed)
    weight, mask = admm(exact, 10)
    assert mask[0].nonzero().flatten().tolist() == [1, 6, 9, 14]
    torch.testing.assert_close(weight, truth)


def test_wanda_scores_are_weight_times_norm_of_input():
    problem = problem_of(2, 3, 6)
    weight, mask = wanda(problem, 0)
    norms = problem.gram.diagonal().sqrt()
    scores = sorted(
        (abs(float(problem.target[i, j])) * float(norms[j]), i, j)
        for i in range(3)
        for j in range(6)
    )
    gone = {(i, j) for _, i, j in scores[: problem.removed]}
    assert {tuple(index) for index in (~mask).nonzero().tolist()} == gone
    torch.testing.assert_close(weight, problem.target * mask)

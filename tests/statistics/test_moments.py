"""The ridge regression of moments, against least squares on the tokens themselves."""

import pytest
import torch

from hf_prune.errors import NumericsError
from hf_prune.statistics.moments import Moments, solve_towards

TOKENS, INPUTS, OUTPUTS = 60, 7, 4


def problem(seed=0, tokens=TOKENS, inputs=INPUTS):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x = draw(tokens, inputs) + 2 * draw(inputs)
    t = x @ draw(inputs, OUTPUTS) + draw(OUTPUTS) + 0.3 * draw(tokens, OUTPUTS)
    return x, t, draw(OUTPUTS, inputs), draw(OUTPUTS)


def moments_of(x, t, parts=1):
    moments = Moments.zeros(x.shape[1], t.shape[1], x.device)
    for a, b in zip(x.chunk(parts), t.chunk(parts), strict=True):
        moments.add(a, b)
    return moments


def augmented(x, t, old, ridge, bias):
    """Minimise the same sum by lstsq: tokens as rows, and a row per input for the pull."""
    x, t, old = x.double(), t.double(), old.double()
    tokens, inputs = x.shape
    centred = x - x.mean(0) if bias else x
    strength = (ridge * centred.square().mean(0).mean() * tokens).sqrt()
    pull = strength * torch.eye(inputs, dtype=torch.float64)
    if bias:
        ones, zeros = torch.ones(tokens, 1), torch.zeros(inputs, 1)
        rows = torch.cat([torch.cat([x, ones], 1), torch.cat([pull, zeros], 1)])
    else:
        rows = torch.cat([x, pull])
    solution = torch.linalg.lstsq(rows, torch.cat([t, pull @ old.T]), driver="gelsd").solution.T
    return (solution[:, :inputs], solution[:, inputs]) if bias else (solution, None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "ridge"),
    [(TOKENS, 1e-6), (TOKENS, 1e-2), (TOKENS, 1.0), (TOKENS, 100.0), (3, 0.1), (3, 1.0)],
)
def test_against_lstsq(bias, ridge, tokens):
    """Also with fewer tokens than inputs: then only the pull makes it solvable."""
    x, t, old, old_bias = problem(tokens=tokens)
    found, found_bias = solve_towards(moments_of(x, t), old, old_bias if bias else None, ridge)
    weight, offset = augmented(x, t, old, ridge, bias)
    torch.testing.assert_close(found, weight.float(), atol=1e-4, rtol=1e-3)
    if bias:
        torch.testing.assert_close(found_bias, offset.float(), atol=5e-3, rtol=1e-3)
    else:
        assert found_bias is None


def test_sums_over_batches():
    x, t, _, _ = problem()
    one, many = moments_of(x, t), moments_of(x, t, parts=6)
    assert int(many.count) == TOKENS
    for key in ("xx", "tx", "x", "t"):
        assert getattr(one, key).dtype == torch.float64
        torch.testing.assert_close(getattr(one, key), getattr(many, key), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(one.xx, x.double().T @ x.double(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(one.tx, t.double().T @ x.double(), atol=1e-3, rtol=1e-5)


def test_a_strong_pull_keeps_the_weights():
    x, t, old, bias = problem()
    found, _ = solve_towards(moments_of(x, t), old, bias, 1e12)
    torch.testing.assert_close(found, old, atol=1e-5, rtol=0)


def test_dtypes_follow():
    x, t, old, bias = problem()
    weight, offset = solve_towards(moments_of(x, t), old.bfloat16(), bias.bfloat16(), 1e-2)
    assert (weight.dtype, offset.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_are_all_zero(bias):
    _, t, old, old_bias = problem()
    x = torch.zeros(TOKENS, INPUTS)
    weight, offset = solve_towards(moments_of(x, t), old, old_bias if bias else None, 1e-2)
    torch.testing.assert_close(weight, old)
    if bias:
        torch.testing.assert_close(offset, t.mean(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    x, t, old, bias = problem()
    x[3, 2] = value
    with pytest.raises(NumericsError, match="inputs of an output projection are not finite"):
        solve_towards(moments_of(x, t), old, bias, 1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_targets_that_are_not_finite(value):
    """Weights that are NaN must never be handed out."""
    x, t, old, bias = problem()
    t[3, 2] = value
    with pytest.raises(NumericsError):
        solve_towards(moments_of(x, t), old, bias, 1e-2)

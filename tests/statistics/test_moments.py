"""The ridge regression of moments, against least squares on the tokens themselves."""

import functools

import pytest
import torch

from hf_prune.errors import NumericsError
from hf_prune.statistics.moments import Moments, fit_checked, rescaled, solve_towards

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
    with pytest.raises(NumericsError, match="inputs of a matrix are not finite"):
        solve_towards(moments_of(x, t), old, bias, 1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_targets_that_are_not_finite(value):
    """Weights that are NaN must never be handed out."""
    x, t, old, bias = problem()
    t[3, 2] = value
    with pytest.raises(NumericsError):
        solve_towards(moments_of(x, t), old, bias, 1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_error_is_that_of_the_tokens(bias):
    """Differences of errors are those of mean squares over the tokens themselves."""
    x, t, weight, offset = problem()
    moments = moments_of(x, t, parts=3)
    found, expected = [], []
    for scale in (1.0, 0.3):
        b = scale * offset if bias else None
        found.append(moments.error(scale * weight, b))
        y = x.double() @ (scale * weight).double().T + (b.double() if bias else 0)
        expected.append(float((y - t.double()).square().sum(dim=1).mean()))
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1], rel=1e-5)


def test_held_out_tokens_choose_the_ridge():
    """Few tokens to fit, noisy targets: held-out tokens want the strong pull to good weights."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(3, 20, generator=generator)
    x = torch.randn(400, 20, generator=generator)
    t = x @ true.T + 3 * torch.randn(400, 3, generator=generator)
    fitted, held_out = moments_of(x[:24], t[:24]), moments_of(x[24:], t[24:])
    ridges = (1e-6, 1.0, 1e4)
    assert fit_checked(fitted, held_out, true, None, ridges)[2] in (1e4, None)
    plenty, rest = moments_of(x[:360], t[:360]), moments_of(x[360:], t[360:])
    far = true + 5
    weight, _, ridge = fit_checked(plenty, rest, far, None, ridges)
    assert ridge == 1e-6
    expected, _ = solve_towards(moments_of(x, t), far, None, 1e-6)
    torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-4)


def test_a_fit_that_held_out_tokens_refute_is_dropped():
    x, t, weight, offset = problem()
    perfect = x @ weight.T + offset
    result = fit_checked(
        moments_of(x[:30], t[:30]), moments_of(x[30:], perfect[30:]), weight, offset, (1e-6, 1e-3)
    )
    assert result[2] is None
    assert torch.equal(result[0], weight)
    assert result[1] is offset


def test_without_held_out_tokens_the_middle_ridge_is_taken():
    x, t, weight, _ = problem()
    moments = moments_of(x, t)
    nothing = Moments.zeros(INPUTS, OUTPUTS, x.device)
    found, _, ridge = fit_checked(moments, nothing, weight, None, (1e-3, 1e-1, 10.0))
    assert ridge == 1e-1
    assert torch.equal(found, solve_towards(moments, weight, None, 1e-1)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_factors_of_units_are_a_least_squares_solution(bias, width, ridge):
    """Against the system written out: one row for each output of each token, and for each pull."""
    generator = torch.Generator().manual_seed(width)
    units, outputs, tokens = 4, 5, 60
    x = torch.randn(tokens, units * width, generator=generator, dtype=torch.float64)
    t = torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, units * width, generator=generator, dtype=torch.float64)
    offset = torch.randn(outputs, generator=generator, dtype=torch.float64) if bias else None
    gives = torch.stack(  # [tokens, outputs, U]
        [
            x[:, u * width : (u + 1) * width] @ weight[:, u * width : (u + 1) * width].T
            for u in range(units)
        ],
        dim=-1,
    )
    matrix, right = gives.flatten(0, 1), t.flatten()
    centred = gives - gives.mean(dim=0) if bias else gives
    pull = (ridge * centred.square().sum(dim=(0, 1)).mean()).sqrt()
    matrix = torch.cat([matrix, pull * torch.eye(units, dtype=torch.float64)])
    if bias:  # one column for each output, which nothing pulls
        ones = torch.eye(outputs, dtype=torch.float64).repeat(tokens, 1)
        none = torch.zeros(units, outputs, dtype=torch.float64)
        matrix = torch.cat([matrix, torch.cat([ones, none])], dim=1)
    right = torch.cat([right, pull * torch.ones(units, dtype=torch.float64)])
    solution = torch.linalg.lstsq(matrix, right.unsqueeze(1)).solution.squeeze(1)
    expected, new_offset = solution[:units], solution[units:]
    found, found_offset = rescaled(moments_of(x, t), weight, offset, ridge, width=width)
    scales = found.view(outputs, units, width) / weight.view(outputs, units, width)
    torch.testing.assert_close(
        scales, expected.view(1, units, 1).expand_as(scales), rtol=1e-4, atol=1e-5
    )
    if bias:
        torch.testing.assert_close(found_offset, new_offset, rtol=1e-4, atol=1e-5)
    else:
        assert found_offset is None


def test_factors_that_held_out_tokens_do_not_confirm_are_not_kept():
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 40, 6, generator=generator).unbind(0)
    weight = torch.randn(3, 6, generator=generator)
    by_unit = functools.partial(rescaled, width=2)
    right, wrong = moments_of(x, x @ weight.T), moments_of(other, 3 * (other @ weight.T))
    kept, _, ridge = fit_checked(wrong, right, weight, None, (1e-3, 1e-1), by_unit)
    assert ridge is None
    assert torch.equal(kept, weight)
    found, _, ridge = fit_checked(wrong, wrong, weight, None, (1e-9, 1e-1), by_unit)
    assert ridge == 1e-9
    torch.testing.assert_close(found, 3 * weight, rtol=1e-3, atol=1e-3)

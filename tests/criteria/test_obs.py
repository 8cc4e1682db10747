"""Structured OBS against a slow reference that re-fits everything from scratch at each step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.criteria import CRITERIA, needs
from hf_prune.criteria.obs import DAMPING, damped_inverse, structured_obs
from hf_prune.errors import NumericsError


def problem(units, width, outputs, seed, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(units * width, units * width, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, units * width, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(outputs, units * width, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / tokens


def error_without(weight, hessian, gone, width):
    """What is lost when some units go and the rest is fitted again, by least squares."""
    units = len(hessian) // width
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    stay = [c for u in range(units) if u not in gone for c in range(u * width, (u + 1) * width)]
    target = weight @ damped
    change = weight.clone()
    if stay:
        fitted = torch.linalg.solve(damped[stay][:, stay], target[:, stay].T).T
        change[:, stay] -= fitted
    return float((change @ damped @ change.T).diagonal().sum())


def slow(weight, hessian, width):
    gone, errors = [], [0.0]
    units = len(hessian) // width
    while len(gone) < units:
        trial = {
            u: error_without(weight, hessian, {*gone, u}, width)
            for u in range(units)
            if u not in gone
        }
        best = min(trial, key=trial.get)
        gone.append(best)
        errors.append(trial[best])
    return gone, errors


@settings(max_examples=40, deadline=None)
@given(units=st.integers(1, 7), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_order_and_errors_against_refitting_from_scratch(units, width, seed):
    weight, hessian = problem(units, width, 4, seed)
    found = structured_obs(weight, hessian, width)
    order, errors = slow(weight, hessian, width)
    assert found.order.tolist() == order
    torch.testing.assert_close(
        found.errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )


def test_blocks_of_many_units_keep_the_error_exact():
    """At the end of any block the curve is the error of re-fitting what is left."""
    weight, hessian = problem(220, 1, 5, 3, tokens=900)
    found = structured_obs(weight, hessian, 1)
    left, step = 220, 0
    while left > 100:
        step += max(1, left // 96)
        left = 220 - step
    gone = set(found.order[:step].tolist())
    exact = error_without(weight, hessian, gone, 1)
    assert float(found.errors[step]) == pytest.approx(exact, rel=1e-6)
    assert sorted(found.order.tolist()) == list(range(220))
    assert (found.errors.diff() >= 0).all()


def test_singular_hessians_and_dead_units():
    weight, _ = problem(6, 2, 3, 0)
    hessian = torch.zeros(12, 12, dtype=torch.float64)
    hessian[4:6, 4:6] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # only unit 2 sees anything
    found = structured_obs(weight, hessian, 2)
    assert found.order[-1] == 2
    assert found.errors.isfinite().all()
    assert structured_obs(weight, torch.zeros_like(hessian), 2).errors.isfinite().all()
    with pytest.raises(NumericsError, match="is it finite"):
        damped_inverse(torch.full((2, 2), float("nan")))


def test_kfac_weights_inputs_and_outputs():
    """The error is the mean of `|R^T dW x|^2`, with `R R^T` the covariance of gradients."""
    units, width, outputs = 4, 2, 3
    weight, hessian = problem(units, width, outputs, 5)
    gradient = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.0]])
    entries = weight.view(outputs, units, width).transpose(0, 1).flatten(1)  # [U, E * D]
    found = CRITERIA["kfac_obs"](entries, hessian=hessian, output_gradient=gradient.double())
    factor = torch.linalg.cholesky(gradient[:2, :2].double())
    root = torch.zeros(3, 2, dtype=torch.float64)
    root[:2] = factor
    expected = structured_obs(root.T @ weight, hessian, width)
    assert found.order.tolist() == expected.order.tolist()
    torch.testing.assert_close(found.errors, expected.errors)
    for name in ("kfac_obs_label", "kfac_obs_sampled"):
        source = name.removeprefix("kfac_obs_")
        factors = {f"{source}_hessian": hessian, f"{source}_output_gradient": gradient.double()}
        assert set(needs(CRITERIA[name])) == set(factors)
        other = CRITERIA[name](entries, **factors)
        assert torch.equal(other.order, found.order)
        assert torch.equal(other.errors, found.errors)
    plain = CRITERIA["obs"](entries, input_gram=hessian)
    torch.testing.assert_close(plain.errors, structured_obs(weight, hessian, width).errors)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99))
def test_block_fisher_adds_what_goes_together(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    matrix = rows.T @ rows
    found = CRITERIA["block_fisher"](torch.zeros(5, 1), projected_gate_fisher=matrix)
    gone, before = [], 0.0
    for unit, error in zip(found.order.tolist(), found.errors[1:].tolist(), strict=True):
        totals = {
            u: float(matrix[[*gone, u]][:, [*gone, u]].sum()) for u in range(5) if u not in gone
        }
        assert totals[unit] == pytest.approx(min(totals.values()))
        gone.append(unit)
        before += max(0.0, totals[unit] - float(matrix[gone[:-1]][:, gone[:-1]].sum()))
        assert error == pytest.approx(before)

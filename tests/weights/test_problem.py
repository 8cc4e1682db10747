"""From moments to a problem and its solution: always solvable, or an error with a name."""

import pytest
import torch
from torch import nn

from hf_prune import sparsify_
from hf_prune.errors import NumericsError
from hf_prune.statistics.moments import Moments
from hf_prune.weights import problem as room
from hf_prune.weights.problem import Options, Subject, solve


@pytest.mark.parametrize("dense_target", [True, False])
@pytest.mark.parametrize("criterion", ["admm", "wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
def test_inputs_that_do_not_vary(criterion, dense_target, scale):
    """What is left of products is rounding, of either sign: more damping, and no NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    inputs = scale * torch.randn(1, 16).expand(64, 16)
    with torch.no_grad():
        before = model(inputs)
    told = {"criterion": criterion, "weights": {"dense_target": dense_target}}
    sparsify_(model, [inputs], sparsity=0.5, **told)
    with torch.no_grad():
        for module in (model[0], model[2]):
            assert torch.isfinite(module.weight).all()
            assert int((module.weight == 0).sum()) * 2 == module.weight.numel()
        torch.testing.assert_close(model(inputs), before, rtol=1e-2, atol=1e-2 * scale)


@pytest.mark.parametrize("seed", range(4))
def test_one_input_that_only_rounding_moves(seed):
    torch.manual_seed(seed)
    layer, inputs = nn.Linear(16, 8), torch.randn(200, 16) * 0.01
    inputs[:, 3] = 30.1
    told = {"criterion": "wanda", "weights": {"dense_target": False}}
    sparsify_(layer, inputs.split(50), sparsity=0.5, **told)
    assert torch.isfinite(layer.weight).all()


def _subject(dtype=torch.float32):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = Moments.zeros(6, 6, weight.device)
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    moments.add(inputs, inputs)
    return Subject("some.weight", 0, weight, None), moments


def test_what_cannot_be_solved_is_named(monkeypatch):
    def fails(problem, steps):
        raise NumericsError("no way")

    subject, moments = _subject()
    monkeypatch.setitem(room.SOLVERS, "wanda", fails)
    with pytest.raises(NumericsError, match=r"some\.weight: no way"):
        solve(subject, moments, 12, Options("wanda"))


def test_what_is_not_finite_is_never_written(monkeypatch):
    """Also what only the type of the parameter cannot hold."""
    subject, moments = _subject(torch.float16)
    monkeypatch.setitem(
        room.SOLVERS,
        "wanda",
        lambda problem, steps: (problem.target * 1e6, problem.target != 0),
    )
    with pytest.raises(NumericsError, match=r"some\.weight: what it would become is not finite in"):
        solve(subject, moments, 12, Options("wanda"))

"""What runs decides what is read: order, routed tokens, and modules that not every batch calls."""

import copy

import pytest
import torch
from torch import nn

from hf_prune import sparsify_
from hf_prune.errors import UnsupportedModelError
from hf_prune.weights.block import prune_block
from hf_prune.weights.find import find_matrices
from hf_prune.weights.parts import merged
from hf_prune.weights.problem import Options
from hf_prune.weights.walk import Block, Real


class Either(nn.Module):
    """Calls one of two layers, by the number of its rows, and then a third."""

    def __init__(self):
        super().__init__()
        self.odd, self.even, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.last((self.odd if len(x) % 2 else self.even)(x).tanh())


class Sometimes(nn.Module):
    """Calls its second layer for an odd number of rows only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.one(x).tanh()
        return self.two(hidden) if len(x) % 2 else hidden


class Experts(nn.Module):
    """Every token goes to the expert that a pruned layer and a pruned router say."""

    def __init__(self):
        super().__init__()
        self.first, self.router, self.last = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        chosen = self.router(x).argmax(dim=-1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                result[rows] = expert(x[rows])
        return self.last(result)


@pytest.mark.parametrize("dense_target", [True, False])
@pytest.mark.parametrize("make", [Either, Sometimes, Experts])
def test_what_the_data_decide(make, dense_target):
    torch.manual_seed(0)
    model = make().eval()
    dense = copy.deepcopy(model)
    batches = [torch.randn(rows, 8) for rows in (31, 32, 33, 64)]
    plain = copy.deepcopy(model)
    told = {"criterion": "magnitude", "sparsity": 0.5}
    own = {"dense_target": False}
    sparsify_(plain, reconstruct=False, weights=own, **told)
    weights = {"dense_target": dense_target}
    result = sparsify_(model, batches, weights=weights, **told)
    assert len(result.masks) == len([m for m in model.modules() if isinstance(m, nn.Linear)])
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    with torch.no_grad():
        losses = [
            sum(float((each(x) - dense(x)).square().mean()) for x in batches)
            for each in (model, plain)
        ]
    assert losses[0] < losses[1], "the re-fit repairs"


def test_routed_experts_are_fitted_to_their_own_inputs():
    """Ordinary least squares on the tokens that the pruned network gives an expert."""
    torch.manual_seed(0)
    model = Experts().eval()
    dense = copy.deepcopy(model)
    inputs = torch.randn(200, 8)
    with torch.no_grad():
        model.first.weight.mul_(-1)  # other tokens go to other experts
    moved = copy.deepcopy(model)
    seen = {}
    for index, expert in enumerate(model.experts):
        expert.register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, args[0].detach())
        )
    matrices = find_matrices(model, targets=["experts.0"])
    block = Block("", dense, model, lambda i: dense(inputs), lambda i: model(inputs), [Real()])
    told = Options(criterion="magnitude", refit_steps=60, ridge=1e-7)
    with torch.no_grad():
        [(_, mask, _)] = list(prune_block(block, matrices, {"experts.0.weight": [32]}, told))
    old, new, rows = moved.experts[0], model.experts[0], seen[0].double()
    wanted = rows @ old.weight.double().T + old.bias.double()
    for row in range(8):
        on = mask[row]
        design = torch.cat([rows[:, on], torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        best = torch.linalg.lstsq(design, wanted[:, row : row + 1]).solution[:, 0]
        ours = torch.cat([new.weight[row, on], new.bias[row : row + 1]]).double()
        torch.testing.assert_close(ours, best, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_matrix_that_never_runs_is_told_before_anything_changes(name, tiny, inputs_for):
    model = tiny(name)
    model.extra = nn.Linear(4, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="calibration never ran extra"):
        sparsify_(model, [inputs_for(name)], sparsity=0.5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_two_orders_in_one():
    assert merged([], ["a", "b", "a"]) == ["a", "b"]
    assert merged(["a", "c"], ["a", "b", "c"]) == ["a", "b", "c"]
    assert merged(["a", "c"], ["z", "c", "d"]) == ["z", "a", "c", "d"]

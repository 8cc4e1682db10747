"""Scores of heads and neurons from the gradients of a training, against sums by hand."""

import pytest
import torch

from hf_prune import PruneCallback
from hf_prune.errors import ConfigError
from hf_prune.recipe import Prune, Schedule
from hf_prune.sites import base_model, logical_weight, projection
from hf_prune.training.structure import StructuredPruning


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_summed_in_float32(tiny, dtype):
    """In the 8 bits of a bfloat16 a sum over hundreds of products is off by percents."""
    model = tiny("bert").to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.rand(parameter.shape, generator=generator).to(dtype)
    pruning = StructuredPruning(
        Prune(criterion="taylor", solver="global", sparsity=0.5, schedule=Schedule()), 0
    )
    pruning.start(model)
    expected = []
    for site in pruning.sites:
        module = projection(base_model(model), site.gate.module)
        products = logical_weight(module).double() * logical_weight(module, gradient=True).double()
        expected.append(products.sum(0).view(site.units, -1).sum(1).abs())
    pruning.observe()
    total = torch.cat(expected).sum()
    for site, exact in zip(pruning.sites, expected, strict=True):
        found = pruning.sums[site.name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact / total, rtol=1e-4, atol=1e-8)


def test_regrowth_needs_gradients():
    def recipe(criterion):
        stage = {"stage": "prune", "criterion": criterion, "solver": "global", "sparsity": 0.5}
        return {"stages": [{**stage, "schedule": {"regrow": True}}, {"stage": "train"}]}

    PruneCallback(recipe("taylor"))
    for criterion in ("magnitude", "random"):
        with pytest.raises(ConfigError, match=rf"regrow needs .*'{criterion}' does not.* Use 'tay"):
            PruneCallback(recipe(criterion))

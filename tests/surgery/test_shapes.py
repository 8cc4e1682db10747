"""Widths: narrowed where they lie, and written down in the config."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import CheckpointError
from hf_prune.surgery.shapes import Changes, get_shapes, keep_index, narrow_, record_shapes_


@pytest.mark.parametrize("bias", [True, False])
def test_narrow_linear(bias):
    layer = nn.Linear(4, 6, bias=bias)
    weight, old_bias = layer.weight.detach().clone(), layer.bias
    narrow_(layer, 0, torch.tensor([1, 5]))
    assert torch.equal(layer.weight, weight[[1, 5]])
    if bias:
        assert torch.equal(layer.bias, old_bias[[1, 5]])
    narrow_(layer, 1, torch.tensor([0, 2, 3]))
    assert torch.equal(layer.weight, weight[[1, 5]][:, [0, 2, 3]])
    assert (layer.out_features, layer.in_features) == (2, 3)
    assert layer(torch.ones(1, 3)).shape == (1, 2)


def test_narrow_conv1d():
    layer = Conv1D(6, 4)
    weight = layer.weight.detach().clone()  # [in, out]
    narrow_(layer, 0, torch.tensor([1, 5]))
    narrow_(layer, 1, torch.tensor([3]))
    assert torch.equal(layer.weight, weight[[3]][:, [1, 5]])
    assert (layer.nf, layer.nx) == (2, 1)
    assert layer.bias.shape == (2,)
    assert layer(torch.ones(1, 1)).shape == (1, 2)


def test_keep_index():
    assert keep_index(5, [3, 0, 3]).tolist() == [1, 2, 4]
    assert keep_index(3, []).tolist() == [0, 1, 2]


def test_record_adds_to_what_is_there(tiny):
    model = tiny("bert")
    first = "encoder.layer.0.output.dense"
    record_shapes_(model, Changes({first}, attributes={"encoder.layer.0": {"width": 3}}))
    changes = Changes({"encoder.layer.1.output.dense"}, attributes={"encoder.layer.0": {"more": 4}})
    record_shapes_(model, changes)
    shapes = get_shapes(model)
    assert shapes["modules"][first] == {"out": 32, "in": 48}
    assert len(shapes["modules"]) == 2
    assert shapes["attributes"] == {"encoder.layer.0": {"width": 3, "more": 4}}
    shapes["modules"].clear()
    assert len(get_shapes(model)["modules"]) == 2, "a copy"


def test_a_quantized_model_is_refused(tiny):
    model = tiny("bert")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="quantization_config of 'gptq': prune first"):
        get_shapes(model)

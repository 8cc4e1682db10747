"""Sparse kernels give the same, and are used only where they were measured to be faster."""

import pytest
import torch
from torch import nn

from hf_prune.errors import ConfigError
from hf_prune.measure import sparse
from hf_prune.measure.sparse import KERNELS, SparseLinear, is_semi_structured, use_sparse_
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_outputs(bias):
    dense = nn.Linear(20, 12, bias=bias)
    dense.weight.data *= torch.rand(12, 20) > 0.8
    inputs = torch.randn(2, 5, 20)
    torch.testing.assert_close(SparseLinear(dense)(inputs), dense(inputs))


def times(monkeypatch, *pairs):
    """Let timings be what the test says."""
    given = iter(pairs)
    monkeypatch.setattr(sparse, "_median_ms", lambda functions, rounds, device: list(next(given)))


def pruned(tiny, name, share):
    model = tiny(name)
    apply_masks_(model, magnitude_masks(find_weights(model, ["classifier*"]), share))
    return model


def test_used_where_it_pays_and_refused_with_the_figure(tiny, inputs_for, logits, monkeypatch):
    model, batch = pruned(tiny, "bert", 0.9), inputs_for("bert")
    before = logits(model, batch)
    times(monkeypatch, (2.0, 1.0), (1.0, 2.0), *[(1.0, 0.95)] * 50)
    timings = use_sparse_(model, batch)
    assert [t.used for t in timings[:3]] == [True, False, False], "1.05 times is below min_gain"
    kinds = [type(model.get_submodule(t.name)) for t in timings]
    assert kinds[:2] == [SparseLinear, nn.Linear]
    assert timings[1].to_dict()["dense_ms"] == 1.0
    assert timings[1].to_dict()["sparse_ms"] == 2.0
    assert all(t.sparsity == pytest.approx(0.9, abs=0.02) for t in timings)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


def all_used(monkeypatch):
    monkeypatch.setattr(sparse, "_median_ms", lambda functions, rounds, device: [2.0, 1.0])


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_models_that_look_at_their_layers(name, tiny, inputs_for, logits, monkeypatch):
    """T5 reads the dtype of a weight, and the layers of GPT-2 are `Conv1D`."""
    model, batch = pruned(tiny, name, 0.9), inputs_for(name)
    before = logits(model, batch)
    all_used(monkeypatch)
    timings = use_sparse_(model, batch)
    used = {t.name.rpartition(".")[2] for t in timings if t.used}
    assert used >= {"t5": {"wi", "wo", "q"}, "gpt2": {"c_attn", "c_proj", "c_fc"}}[name]
    assert all(type(model.get_submodule(t.name)) is SparseLinear for t in timings)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)
    assert use_sparse_(model, batch) == [], "once"


@pytest.mark.parametrize("batch", [torch.randn(4, 32), (torch.randn(4, 32),)])
def test_any_module(batch, monkeypatch):
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].weight.data *= torch.rand(16, 32) > 0.8
    inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
    before = model(inputs)
    all_used(monkeypatch)
    assert [t.name for t in use_sparse_(model, batch)] == ["0"]
    torch.testing.assert_close(model(inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_without_a_kernel_is_refused(dtype, tiny, inputs_for):
    model = pruned(tiny, "bert", 0.9).to(dtype)
    with pytest.raises(ConfigError, match=rf"are for torch.float32, .* layers are {dtype}"):
        use_sparse_(model, inputs_for("bert"))


def test_dense_layers_are_not_timed(tiny, inputs_for):
    assert use_sparse_(tiny("bert"), inputs_for("bert")) == []


def test_real_times_are_positive(tiny, inputs_for):
    timings = use_sparse_(pruned(tiny, "llama", 0.8), inputs_for("llama"), rounds=2)
    assert timings
    assert all(t.dense_ms > 0 and t.sparse_ms > 0 for t in timings)


def two_of_four(rows, columns, dtype=torch.bfloat16):
    """A linear layer whose two smallest of any four neighbours are zero."""
    dense = nn.Linear(columns, rows, dtype=dtype)
    fours = dense.weight.data.view(rows, -1, 4)
    fours.scatter_(-1, fours.abs().topk(2, dim=-1, largest=False).indices, 0)
    return dense


def test_two_of_four_is_seen_in_every_group():
    weight = two_of_four(32, 64).weight.data
    assert is_semi_structured(weight)
    at = int((weight[7] == 0).nonzero()[3])
    weight[7, at] = 1.0
    assert not is_semi_structured(weight), "three of four in one group of one row"
    assert not is_semi_structured(torch.zeros(4, 6)), "no groups of four"
    assert not is_semi_structured(torch.eye(8)[:, [0, 4, 1, 2, 3, 5, 6, 7]] + torch.ones(8, 1))


@pytest.mark.parametrize(
    ("dense", "fits"),
    [
        (two_of_four(64, 128), True),
        (two_of_four(48, 128), False),
        (two_of_four(64, 96), False),
        (nn.Linear(128, 64, dtype=torch.bfloat16), False),
    ],
)
def test_which_layers_the_kernels_of_cuda_take(dense, fits):
    assert KERNELS["cuda"].fits(dense) is fits


@pytest.mark.gpu
def test_two_of_four_on_a_device():
    dense = two_of_four(256, 512).cuda()
    before = dense.weight.clone()
    sparse = KERNELS["cuda"].make(dense)
    inputs = torch.randn(64, 512, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(sparse(inputs), dense(inputs), atol=0.05, rtol=0.05)
    assert torch.equal(dense.weight, before)
    assert sparse.bias is dense.bias


def test_on_a_device_without_a_kernel(tiny, inputs_for):
    with pytest.raises(ConfigError, match="no sparse kernel is known for 'meta'"):
        use_sparse_(tiny("bert").to("meta"), inputs_for("bert"))

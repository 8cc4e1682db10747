"""What matrices are multiplied with: packed experts of several models, and what is not known."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from hf_prune import sparsify_
from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.streams import Call
from hf_prune.weights.find import find_matrices
from hf_prune.weights.rows import rows_of

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
}


def tokens():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 99, (8, 8), generator=generator)} for _ in range(2)]


class Clamped(nn.Module):
    """Packed experts whose gate is one of their own, as in several models of transformers."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(3 * torch.randn(2, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 6, 4))
        self.act_fn = nn.functional.silu

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=1)) * up.clamp(-1, 1)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        result = torch.zeros_like(hidden_states)
        for place, expert in top_k_index.tolist():
            both = nn.functional.linear(hidden_states[place], self.gate_up_proj[expert])
            result[place] += self._apply_gate(both) @ self.down_proj[expert].T
        return result


def test_the_gate_of_experts_is_their_own():
    module = Clamped()
    hidden, index = torch.randn(5, 6), torch.tensor([[0], [1], [0], [1], [1]])
    (down,) = [m for m in find_matrices(module) if m.name == "down_proj"]
    rows = rows_of(down, module, Call((hidden, index, torch.ones(5, 1)), {}), None)
    for expert, found in enumerate(rows):
        mine = hidden[index[:, 0] == expert]
        wanted = module._apply_gate(nn.functional.linear(mine, module.gate_up_proj[expert]))
        torch.testing.assert_close(found, wanted)
        assert float(found.abs().max()) <= 1, "clamped"


def test_transposed_experts_with_biases_are_followed(monkeypatch):
    """The inputs of each `down_proj` are those that GPT-OSS multiplies it with."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_experts_per_tok=2)).eval()
    experts = model.model.layers[0].mlp.experts
    nn.init.normal_(experts.gate_up_proj_bias)
    seen = []
    gate = GptOssExperts._apply_gate
    monkeypatch.setattr(
        GptOssExperts, "_apply_gate", lambda self, both: seen.append(gate(self, both)) or seen[-1]
    )
    calls = []
    experts.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
    )
    model.set_experts_implementation("eager")
    with torch.no_grad():
        model(**tokens()[0])
    (down,) = [m for m in find_matrices(experts) if m.name == "down_proj"]
    wanted, _ = list(seen), seen.clear()
    rows = [part for part in rows_of(down, experts, calls[0], None) if len(part)]
    assert len(rows) >= 2
    for found, made in zip(rows, wanted, strict=False):
        order = [part[:, 0].argsort() for part in (found, made)]  # it takes them by rank
        torch.testing.assert_close(found[order[0]], made[order[1]])
    pruned = sparsify_(model, tokens(), sparsity=0.5)
    assert pruned.errors["model.layers.1.mlp.experts.down_proj"] < 0.5
    gone = ~pruned.masks["model.layers.0.mlp.experts.down_proj"]
    assert int(gone.sum()) == gone.numel() // 2
    assert not experts.down_proj[gone].any()


@pytest.mark.parametrize("ignore", [(), ("*down_proj",)])
def test_experts_that_are_not_told_their_tokens_are_refused_first(ignore):
    model = Llama4ForCausalLM(Llama4TextConfig(**SIZES, intermediate_size_mlp=32)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"experts\.gate_up_proj: .* Llama4TextExperts"):
        sparsify_(model, tokens(), sparsity=0.5, ignore=ignore)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name
    plain = {"criterion": "magnitude", "reconstruct": False}
    own = {"dense_target": False, "pattern": "2:4", "targets": ("*experts*",)}
    masks = sparsify_(copy.deepcopy(model), **plain, weights=own).masks
    for mask in masks.values():  # [X, C, R]: two of four neighbouring inputs stay
        assert bool((mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all())
    assert len(masks) == 4
    sparsify_(model, tokens(), sparsity=0.5, ignore=("*experts*",))
    assert not (model.model.layers[0].self_attn.q_proj.weight != 0).all()


def test_padding_of_attention_that_computes_inside():
    """That of keys is told by the call, that of queries by a mask, or by keys that are as many."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    query, key = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[3], [4]])
    real = torch.arange(5) < torch.tensor([[5], [1]])
    matrices = find_matrices(module)

    def counts(call, mask):
        return [len(part) for m in matrices for part in rows_of(m, module, call, mask)]

    told = {"key_padding_mask": padding}
    assert counts(Call((query, key, key), told), None) == [10, 7, 7, 10]
    assert counts(Call((query, key, key), told), real) == [6, 7, 7, 6]
    moved = key + torch.randn(7, 16)  # as where positions are added to queries and keys
    assert counts(Call((moved, moved.clone(), key), told), None) == [7, 7, 7, 7]
    floats = {"key_padding_mask": torch.zeros(2, 7).masked_fill(padding, -torch.inf)}
    assert counts(Call((key, key, key), floats), None) == [7, 7, 7, 7]
    assert counts(Call((query, query, query), {}), real) == [6, 6, 6, 6]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "fields", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}, {"add_zero_attn": True}], ids=str
)
def test_rows_of_attention_that_computes_inside(fields, batch_first):
    """Multiplied with the matrices, they give queries, keys and values, and what comes out."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **fields).eval()
    sizes = (16, fields.get("kdim", 16), fields.get("vdim", 16))
    times = (5, 7, 7)
    inputs = [torch.randn(3, t, c) for t, c in zip(times, sizes, strict=True)]
    given = inputs if batch_first else [value.transpose(0, 1) for value in inputs]
    seen = {}

    def attention(query, key, value, *args, **kwargs):
        seen.update(query=query, key=key, value=value)
        return plain(query, key, value, *args, **kwargs)

    plain, call = F.scaled_dot_product_attention, Call(tuple(given), {"need_weights": False})
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", attention)
        output = module(*call.args, **call.kwargs)[0]
    output = output if batch_first else output.transpose(0, 1)
    rows = {m.name: (m, rows_of(m, module, call, None)) for m in find_matrices(module)}
    matrix, found = rows.pop("out_proj.weight")
    bias = 0 if module.out_proj.bias is None else module.out_proj.bias
    torch.testing.assert_close(found[0] @ matrix.parameter.T + bias, output.flatten(0, 1))
    weights = [part for m, _ in rows.values() for part in m.view(m.parameter)]
    parts = [part for _, found in rows.values() for part in found]
    biases = [0] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    zeros = int(bool(fields.get("add_zero_attn")))
    for name, x, weight, bias, time in zip(seen, parts, weights, biases, times, strict=True):
        heads = seen[name] if name == "query" else seen[name][:, :, : seen[name].shape[2] - zeros]
        made = (x @ weight.T + bias).view(3, time, 4, 4).transpose(1, 2)  # [B, heads, T, D]
        torch.testing.assert_close(made, heads)

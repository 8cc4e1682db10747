"""Layers of families that nobody has described, where one pass shows that they are a chain."""

import pytest
import torch
import transformers as hf
from tinies import _LLAMA, _SIZES, _SPECIAL
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from hf_prune import sparsify_
from hf_prune.weights import prune as room
from hf_prune.weights.chains import chained_layers

GPT = {"vocab_size": 99, "hidden_size": 32, "max_position_embeddings": 140, **_SPECIAL}
MODELS = {
    "starcoder2": (AutoModelForCausalLM, lambda: hf.Starcoder2Config(**_LLAMA)),
    "cohere": (AutoModelForCausalLM, lambda: hf.CohereConfig(**_LLAMA)),
    "megatron-bert": (AutoModelForMaskedLM, lambda: hf.MegatronBertConfig(**_SIZES)),
    "bloom": (
        AutoModelForCausalLM,
        lambda: hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL),
    ),
    "gptj": (
        AutoModelForCausalLM,
        lambda: hf.GPTJConfig(
            vocab_size=99, n_positions=140, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **_SPECIAL
        ),
    ),
}


def build(name):
    torch.manual_seed(0)
    loader, config = MODELS[name]
    return loader.from_config(config()).eval()


class Loose(PreTrainedModel):
    """Layers that pass hidden states on in one of several ways."""

    config_class = hf.PretrainedConfig

    def __init__(self, config, way="plain"):
        super().__init__(config)
        self.embed, self.way = nn.Embedding(99, 8), way
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden, extra = self.embed(input_ids), torch.zeros(8)
        for layer in reversed(self.layers) if self.way == "backwards" else self.layers:
            if self.way == "scaled":
                hidden = hidden * 2
            if self.way == "in place":
                hidden.mul_(2)
            if self.way == "newer":
                extra = hidden.mean(dim=1, keepdim=True)
            if self.way == "in a dict":
                layer(hidden, {"hidden": hidden})
            hidden = layer(hidden, extra)
        if self.way == "twice":
            hidden = self.layers[0](hidden, extra)
        return (hidden,)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden, extra):
        more = extra if isinstance(extra, torch.Tensor) else 0
        return hidden + self.two(self.one(hidden + more).tanh())


@pytest.mark.parametrize(
    "way", ["plain", "scaled", "in place", "newer", "in a dict", "twice", "backwards"]
)
def test_what_is_no_chain_is_none(way):
    model = Loose(hf.PretrainedConfig(hidden_size=8), way).eval()
    found = chained_layers(model, {"input_ids": torch.randint(0, 99, (2, 5))})
    assert found == (["layers.0", "layers.1", "layers.2"] if way == "plain" else [])


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("told", [{}, {"criterion": "wanda"}], ids=["admm", "wanda"])
def test_layer_by_layer_and_whole_give_the_same(name, told, inputs_for, monkeypatch):
    batches = [inputs_for("llama", seed) for seed in range(2)]
    first, second = build(name), build(name)
    assert len(chained_layers(first, batches[0])) == 2
    sparsify_(first, batches, sparsity=0.5, **told)
    monkeypatch.setattr(room, "known_layers", lambda *args: {})
    sparsify_(second, batches, sparsity=0.5, **told)
    for (key, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=key)


def test_deeper_models_run_as_often_as_a_whole(inputs_for):
    runs = []
    for layers in (2, 4):
        torch.manual_seed(0)
        config = hf.Starcoder2Config(**{**_LLAMA, "num_hidden_layers": layers})
        model, calls = AutoModelForCausalLM.from_config(config).eval(), []
        model.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        batches = [inputs_for("llama", seed) for seed in range(2)]
        sparsify_(model, batches, sparsity=0.5, ignore=["lm_head*"])
        runs.append(len(calls))
        left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        assert left == hooks
    assert runs[0] == runs[1]


def test_an_unknown_family_keeps_its_progress(inputs_for, tmp_path):
    batches, told = [inputs_for("llama")], {"sparsity": 0.5, "progress": tmp_path / "state"}
    sparsify_(build("gptj"), batches, **told)
    again = build("gptj")
    assert sparsify_(again, batches, **told).resumed == ["transformer.h.0", "transformer.h.1"]

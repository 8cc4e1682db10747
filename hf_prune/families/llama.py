"""Llama and the families that share its layers: grouped queries, gated feed-forward blocks."""

from dataclasses import replace

from hf_prune.families.spec import Attention, Experts, Family, Ffn, Stack

_ATTENTION = Attention(
    path="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    out="o_proj",
    sum="post_attention_layernorm",
    head_dim="head_dim",
    sizes=("num_attention_heads", "num_key_value_heads"),
    empty="block",
)
_FFN = Ffn(
    path="mlp",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    sum="",
    counts=("intermediate_size",),
)
_EXPERTS = Experts(path="mlp.experts", router="mlp.gate", sum="")

LLAMA_STACK = Stack(layers="layers", attention=_ATTENTION, ffn=_FFN)
# each block's output passes a norm before it is added: that norm gets the output, and no residual
_NORM_AFTER = replace(LLAMA_STACK, ffn=replace(_FFN, sum="post_feedforward_layernorm"))

LLAMA = Family("llama", (LLAMA_STACK,))
MISTRAL = Family("mistral", (LLAMA_STACK,))
QWEN2 = Family("qwen2", (LLAMA_STACK,))
QWEN3 = Family("qwen3", (LLAMA_STACK,))
GEMMA = Family("gemma", (LLAMA_STACK,))
GEMMA2 = Family("gemma2", (_NORM_AFTER,))
GEMMA3_TEXT = Family("gemma3_text", (_NORM_AFTER,))
GEMMA3 = Family(
    "gemma3",
    (
        replace(
            _NORM_AFTER,
            layers="language_model.layers",
            attention=replace(
                _ATTENTION,
                sizes=("text_config.num_attention_heads", "text_config.num_key_value_heads"),
            ),
            ffn=replace(
                _FFN, sum="post_feedforward_layernorm", size="text_config.intermediate_size"
            ),
            length="text_config.num_hidden_layers",
        ),
    ),
)
SMOLLM3 = Family("smollm3", (LLAMA_STACK,))
_FEW = replace(_EXPERTS, sizes=("num_local_experts", "intermediate_size"))
MIXTRAL = Family("mixtral", (replace(LLAMA_STACK, ffn=None, experts=_FEW),))
QWEN3_MOE = Family("qwen3_moe", (replace(LLAMA_STACK, experts=_EXPERTS),))

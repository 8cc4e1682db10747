"""Llama: grouped queries, gated feed-forward blocks."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

LLAMA = Family(
    "llama",
    (
        Stack(
            layers="layers",
            attention=Attention(
                path="self_attn",
                q="q_proj",
                k="k_proj",
                v="v_proj",
                out="o_proj",
                sum="post_attention_layernorm",
                head_dim="head_dim",
            ),
            ffn=Ffn(
                path="mlp",
                up=("mlp.gate_proj", "mlp.up_proj"),
                down="mlp.down_proj",
                sum="",
                counts=("intermediate_size",),
            ),
        ),
    ),
)

"""Phi (both blocks read the layer's input) and Phi-3 (everything packed)."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

PHI = Family(
    "phi",
    (
        Stack(
            layers="layers",
            attention=Attention(
                path="self_attn",
                q="q_proj",
                k="k_proj",
                v="v_proj",
                out="dense",
                sum="",
                head_dim="head_dim",
                sizes=("num_attention_heads", "num_key_value_heads"),
                empty="block",
            ),
            ffn=Ffn(up=("mlp.fc1",), down="mlp.fc2", sum=""),
        ),
    ),
)

PHI3 = Family(
    "phi3",
    (
        Stack(
            layers="layers",
            attention=Attention(
                path="self_attn",
                qkv="qkv_proj",
                out="o_proj",
                sum="post_attention_layernorm",
                head_dim="head_dim",
                sizes=("num_attention_heads", "num_key_value_heads"),
                empty="block",
                kv_counts=("num_key_value_heads",),  # read by forward, as is the next
                config_counts=("num_attention_heads",),
            ),
            ffn=Ffn(up=("mlp.gate_up_proj",), down="mlp.down_proj", sum="", packed=2),
        ),
    ),
)

"""ALBERT: a few layers that are run again and again, so that one site stands for many depths."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

ALBERT = Family(
    "albert",
    (
        Stack(
            layers="encoder.albert_layer_groups.*.albert_layers",
            depth="num_hidden_layers",
            attention=Attention(
                path="attention",
                q="query",
                k="key",
                v="value",
                out="dense",
                sum="attention.LayerNorm",
                head_dim="attention_head_size",
                counts=("num_attention_heads",),
                widths=("all_head_size",),
            ),
            ffn=Ffn(up=("ffn",), down="ffn_output", sum="full_layer_layer_norm"),
        ),
    ),
)

"""ModernBERT: packed queries, keys and values; packed input and gate; norms before the blocks."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

MODERNBERT = Family(
    "modernbert",
    (
        Stack(
            layers="layers",
            attention=Attention(
                path="attn", qkv="Wqkv", out="Wo", sum="mlp_norm", head_dim="head_dim"
            ),
            ffn=Ffn(up=("mlp.Wi",), down="mlp.Wo", sum="", packed=2),
        ),
    ),
)

"""GPT-2: one `Conv1D` packs queries, keys and values."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

GPT2 = Family(
    "gpt2",
    (
        Stack(
            layers="h",
            attention=Attention(
                path="attn",
                qkv="c_attn",
                out="c_proj",
                sum="ln_2",
                head_dim="head_dim",
                empty="block",
                counts=("num_heads",),
                widths=("split_size",),  # read by forward to take the packed projection apart
            ),
            cross=Attention(
                path="crossattention",
                q="q_attn",
                kv="c_attn",
                out="c_proj",
                sum="ln_2",
                head_dim="head_dim",
                empty="block",
                counts=("num_heads",),
                widths=("split_size",),
            ),
            ffn=Ffn(up=("mlp.c_fc",), down="mlp.c_proj", sum="", size="n_inner"),
        ),
    ),
)

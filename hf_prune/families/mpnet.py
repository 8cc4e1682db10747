"""MPNet: BERT with a position bias that the encoder computes once for all layers."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

MPNET = Family(
    "mpnet",
    (
        Stack(
            layers="encoder.layer",
            attention=Attention(
                path="attention",
                core="attn",
                q="attn.q",
                k="attn.k",
                v="attn.v",
                out="attn.o",
                sum="attention.LayerNorm",
                head_dim="attention_head_size",
                counts=("num_attention_heads",),
                widths=("all_head_size",),  # read by forward to join the heads
                shared_bias="mpnet",
            ),
            ffn=Ffn(up=("intermediate.dense",), down="output.dense", sum="output.LayerNorm"),
        ),
    ),
)

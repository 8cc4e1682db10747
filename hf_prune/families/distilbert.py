"""DistilBERT."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

DISTILBERT = Family(
    "distilbert",
    (
        Stack(
            layers="transformer.layer",
            attention=Attention(
                path="attention",
                q="q_lin",
                k="k_lin",
                v="v_lin",
                out="out_lin",
                sum="sa_layer_norm",
                head_dim="attention_head_size",
                counts=("n_heads",),
                widths=("dim",),
            ),
            ffn=Ffn(up=("ffn.lin1",), down="ffn.lin2", sum="output_layer_norm", size="hidden_dim"),
        ),
    ),
)

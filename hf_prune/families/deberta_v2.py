"""DeBERTa v2 and v3: positions have keys and queries of their own, unless they share those."""

from hf_prune.families.spec import Attention, Family, Ffn, Stack

DEBERTA_V2 = Family(
    "deberta-v2",
    (
        Stack(
            layers="encoder.layer",
            attention=Attention(
                path="attention",
                core="self",
                q="self.query_proj",
                k="self.key_proj",
                v="self.value_proj",
                more=("self.pos_key_proj", "self.pos_query_proj"),
                out="output.dense",
                sum="attention.output.LayerNorm",
                head_dim="attention_head_size",
                counts=("num_attention_heads",),  # read by forward to take heads apart
                widths=("all_head_size",),
                empty="context",
            ),
            ffn=Ffn(up=("intermediate.dense",), down="output.dense", sum="output.LayerNorm"),
        ),
    ),
)

"""BERT and the families that share its layers."""

from dataclasses import replace

from hf_prune.families.spec import Attention, Family, Ffn, Stack

BERT_ATTENTION = Attention(
    path="attention",
    core="self",
    q="self.query",
    k="self.key",
    v="self.value",
    out="output.dense",
    sum="attention.output.LayerNorm",
    head_dim="attention_head_size",
    counts=("num_attention_heads",),
    widths=("all_head_size",),
    empty="context",
)
BERT_STACK = Stack(
    layers="encoder.layer",
    attention=BERT_ATTENTION,
    cross=replace(BERT_ATTENTION, path="crossattention", sum="crossattention.output.LayerNorm"),
    ffn=Ffn(up=("intermediate.dense",), down="output.dense", sum="output.LayerNorm"),
)

BERT = Family("bert", (BERT_STACK,))
ROBERTA = Family("roberta", (BERT_STACK,))
XLM_ROBERTA = Family("xlm-roberta", (BERT_STACK,))
CAMEMBERT = Family("camembert", (BERT_STACK,))
ELECTRA = Family("electra", (BERT_STACK,))

"""GPT-NeoX: queries, keys and values are packed head by head; both blocks read the layer's input.

Models without `use_parallel_residual` run one block after the other.
"""

from dataclasses import replace

from hf_prune.families.spec import Attention, Family, Ffn, Stack, Variant

_ATTENTION = Attention(
    path="attention",
    qkv="query_key_value",
    interleaved=True,
    out="dense",
    sum="",
    head_dim="head_size",
    empty="block",
)
_PARALLEL = Stack(
    layers="layers",
    attention=_ATTENTION,
    ffn=Ffn(up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h", sum=""),
)
_IN_TURN = replace(_PARALLEL, attention=replace(_ATTENTION, sum="post_attention_layernorm"))

GPT_NEOX = Family("gpt_neox", (_PARALLEL,), (Variant("use_parallel_residual", False, (_IN_TURN,)),))

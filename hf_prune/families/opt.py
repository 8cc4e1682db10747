"""OPT: a decoder with its norms before the blocks (after them in the model of 350M)."""

from dataclasses import replace

from hf_prune.families.spec import Attention, Family, Ffn, Stack, Variant

_ATTENTION = Attention(
    path="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    out="out_proj",
    sum="final_layer_norm",
    head_dim="head_dim",
    empty="block",
    counts=("num_heads",),  # read by forward to take heads apart
)
_FFN = Ffn(up=("fc1",), down="fc2", sum="", size="ffn_dim")
_BEFORE = Stack(layers="decoder.layers", attention=_ATTENTION, ffn=_FFN)
_AFTER = Stack(
    layers="decoder.layers",
    attention=replace(_ATTENTION, sum="self_attn_layer_norm"),
    ffn=replace(_FFN, sum="final_layer_norm"),
)

OPT = Family("opt", (_BEFORE,), (Variant("do_layer_norm_before", False, (_AFTER,)),))

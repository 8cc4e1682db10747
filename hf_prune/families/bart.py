"""BART and Whisper: an encoder, and a decoder with cross-attention."""

from dataclasses import replace

from hf_prune.families.spec import Attention, Family, Ffn, Stack

_ATTENTION = Attention(
    path="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    out="out_proj",
    sum="self_attn_layer_norm",
    head_dim="head_dim",
    empty="block",
    counts=("num_heads",),  # read by Whisper's forward
)
_CROSS = replace(_ATTENTION, path="encoder_attn", sum="encoder_attn_layer_norm")
_FFN = Ffn(up=("fc1",), down="fc2", sum="final_layer_norm", size="encoder_ffn_dim")
_DECODER_FFN = replace(_FFN, size="decoder_ffn_dim")

BART = Family(
    "bart",
    (
        Stack("encoder.layers", _ATTENTION, _FFN, length="encoder_layers"),
        Stack("decoder.layers", _ATTENTION, _DECODER_FFN, cross=_CROSS, length="decoder_layers"),
    ),
)

# norms stand before the blocks: the next one gets the sum
_END = replace(_FFN, sum="")
WHISPER = Family(
    "whisper",
    (
        Stack(
            layers="encoder.layers",
            attention=replace(_ATTENTION, sum="final_layer_norm"),
            ffn=_END,
            length="encoder_layers",
        ),
        Stack(
            layers="decoder.layers",
            attention=replace(_ATTENTION, sum="encoder_attn_layer_norm"),
            cross=replace(_CROSS, sum="final_layer_norm"),
            ffn=replace(_DECODER_FFN, sum=""),
            length="decoder_layers",
        ),
    ),
)

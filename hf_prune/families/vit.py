"""Images and speech: ViT, CLIP with its parts, wav2vec 2.0."""

from dataclasses import replace

from hf_prune.families.spec import Attention, Family, Ffn, Stack, Variant

VIT = Family(
    "vit",
    (
        Stack(
            layers="layers",
            attention=Attention(
                path="attention",
                q="q_proj",
                k="k_proj",
                v="v_proj",
                out="o_proj",
                sum="layernorm_after",
                head_dim="head_dim",
                sizes=("num_attention_heads",),
                counts=("num_attention_heads",),
            ),
            ffn=Ffn(up=("mlp.fc1",), down="mlp.fc2", sum=""),
        ),
    ),
)

_CLIP_FFN = Ffn(up=("mlp.fc1",), down="mlp.fc2", sum="")
_CLIP = Stack(
    layers="encoder.layers",
    attention=Attention(
        path="self_attn",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        out="out_proj",
        sum="layer_norm2",
        head_dim="head_dim",
        counts=("num_heads",),
    ),
    ffn=_CLIP_FFN,
)

CLIP = Family(
    "clip",
    (
        replace(
            _CLIP,
            layers="text_model.encoder.layers",
            ffn=replace(_CLIP_FFN, size="text_config.intermediate_size"),
            length="text_config.num_hidden_layers",
        ),
        replace(
            _CLIP,
            layers="vision_model.encoder.layers",
            ffn=replace(_CLIP_FFN, size="vision_config.intermediate_size"),
            length="vision_config.num_hidden_layers",
        ),
    ),
)
CLIP_TEXT = Family("clip_text_model", (_CLIP,))
CLIP_VISION = Family("clip_vision_model", (_CLIP,))

_SPEECH_ATTENTION = Attention(
    path="attention",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    out="out_proj",
    sum="layer_norm",
    head_dim="head_dim",
    counts=("num_heads",),
)
_SPEECH_FFN = Ffn(
    up=("feed_forward.intermediate_dense",),
    down="feed_forward.output_dense",
    sum="final_layer_norm",
)
_AFTER = Stack(layers="encoder.layers", attention=_SPEECH_ATTENTION, ffn=_SPEECH_FFN)
_BEFORE = Stack(
    layers="encoder.layers",
    attention=replace(_SPEECH_ATTENTION, sum="final_layer_norm"),
    ffn=replace(_SPEECH_FFN, sum=""),
)

WAV2VEC2 = Family("wav2vec2", (_AFTER,), (Variant("do_stable_layer_norm", True, (_BEFORE,)),))

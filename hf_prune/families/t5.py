"""T5: the first layer of each stack computes one position bias for all of them."""

from dataclasses import replace

from hf_prune.families.spec import Attention, Family, Ffn, Stack, Variant

_ATTENTION = Attention(
    path="layer.0.SelfAttention",
    q="q",
    k="k",
    v="v",
    out="o",
    sum="layer.1.layer_norm",
    head_dim="key_value_proj_dim",
    counts=("n_heads",),
    widths=("inner_dim",),
    shared_bias="t5",
    empty="t5",
)


def _stacks(up: tuple[str, ...]) -> tuple[Stack, ...]:
    def ffn(place: str) -> Ffn:
        block = f"{place}.DenseReluDense"
        return Ffn(
            up=tuple(f"{block}.{name}" for name in up), down=f"{block}.wo", sum="", size="d_ff"
        )

    cross = replace(_ATTENTION, path="layer.1.EncDecAttention", sum="layer.2.layer_norm")
    return (
        Stack("encoder.block", _ATTENTION, ffn("layer.1"), length="num_layers"),
        Stack(
            "decoder.block", _ATTENTION, ffn("layer.2"), cross=cross, length="num_decoder_layers"
        ),
    )


T5 = Family("t5", _stacks(("wi",)), (Variant("is_gated_act", True, _stacks(("wi_0", "wi_1"))),))

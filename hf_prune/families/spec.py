"""The words in which a family is described. Data only: no torch, no code per family."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """One attention block. Names are relative to `path`, but for `sum`.

    Either `q`, `k` and `v` name three projections, or `qkv` names one that packs them one after the
    other. `counts` are attributes that hold the number of (query) heads and `widths` those that
    hold heads times head width; both are on the module `core` and are kept true after surgery.
    """

    path: str
    """From the layer to the block."""
    out: str
    """Output projection."""
    sum: str
    """From the layer to the module that gets the sum of residual and output; "" = layer's end."""
    head_dim: str
    """Attribute of `core` with the width of one head."""
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    core: str = ""
    """From the block to the module that does the attention; "" = the block itself."""
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ffn:
    """One feed-forward block. Names are relative to the layer; `counts` are on `path`."""

    up: tuple[str, ...]
    """Projections from the model's width to the neurons; two of them when gated."""
    down: str
    """Projection back."""
    sum: str
    """As in `Attention`."""
    path: str = ""
    counts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A list of equal layers."""

    layers: str
    """From the base model to the list."""
    attention: Attention
    ffn: Ffn


@dataclass(frozen=True)
class Family:
    """Where the heads, the neurons and the layers of one `model_type` are."""

    model_type: str
    stacks: tuple[Stack, ...]

"""The words in which a family is described. Data only: no torch, no code per family."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """One attention block. Names are relative to `path`, but for `sum`.

    Either `q`, `k` and `v` name three projections; or `q` and `kv` name two, of which the second
    packs keys and values one after the other; or `qkv` names one that packs all three. `counts` are
    attributes that hold the number of query heads, `widths` those that hold query heads times head
    width, `kv_counts` those that hold the number of key/value heads. All are on the module `core`
    and are kept true after surgery.
    """

    path: str
    """From the layer to the block."""
    out: str
    """Output projection."""
    sum: str
    """From the layer to the module that gets the sum of residual and output; "" = layer's end. A
    block whose output passes a norm of its own before it is added names that norm."""
    head_dim: str | int
    """Attribute of `core` with the width of one head; or, in the description of one model, that
    width."""
    q: str = ""
    k: str = ""
    v: str = ""
    kv: str = ""
    qkv: str = ""
    interleaved: bool = False
    """Whether `qkv` holds query, key and value of head 0, then those of head 1, and so on."""
    more: tuple[str, ...] = ()
    """Further projections whose rows belong to heads, where the model has them."""
    core: str = ""
    """From the block to the module that does the attention; "" = the block itself."""
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    kv_counts: tuple[str, ...] = ()
    config_counts: tuple[str, ...] = ()
    """Keys of `core.config` that `forward` reads and that hold the number of query heads."""
    sizes: tuple[str, ...] = ()
    """Keys of the config by which it can say, for all layers alike, how many query heads and
    key/value heads there are, without changing anything else; () = it cannot."""
    shared_bias: Literal["", "t5", "mpnet"] = ""
    """How a position bias that all layers share reaches the block. Each slices what it kept."""
    empty: Literal["", "block", "context", "t5"] = ""
    """What runs where no head is left: the block with matrices of width 0, as it is; a `block` that
    gives the bias of its output; a `core` that gives a `context` of width 0; T5's block. The last
    three fill caches, whose length is read from the first layer."""


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
    size: str = "intermediate_size"
    """Key of the config that says, for all layers alike, how many neurons there are."""
    packed: int = 1
    """How many matrices each of `up` holds one after the other: 2 where gate and input are one."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts whose weights are fused into two parameters. Names are from the layer.

    A neuron is the same row in every expert, since fused experts have one width.
    """

    path: str
    """The module with the fused parameters `up` `[X, 2 * F, E]` and `down` `[X, E, F]`."""
    router: str
    """The module whose parameter `weight` `[X, E]` gives one logit for each expert."""
    sum: str
    """As in `Attention`."""
    up: str = "gate_up_proj"
    down: str = "down_proj"
    counts: tuple[str, ...] = ("num_experts",)
    """Attributes of `path` and of `router` that hold the number of experts."""
    widths: tuple[str, ...] = ("intermediate_dim",)
    """Attributes of `path` that hold the number of neurons."""
    sizes: tuple[str, str] = ("num_experts", "moe_intermediate_size")
    """Keys of the config that say, for all layers alike, how many experts and neurons there are."""
    chosen: str = "top_k"
    """Attribute of `router`: how many experts each token is sent to."""


@dataclass(frozen=True)
class Stack:
    """A list of equal layers.

    A stack that a model does not have is left out, as long as it has one of the others: an encoder
    alone, a decoder alone. Of the blocks of a layer, too, those count that are there: a decoder has
    cross-attention only where its config asks for it.
    """

    layers: str
    """From the base model to the list. `*` stands for each index of a list of lists."""
    attention: Attention
    ffn: Ffn | None = None
    cross: Attention | None = None
    experts: Experts | None = None
    depth: str = ""
    """Key of the config that says how many times the lists are run in turn (shared layers)."""
    length: str = "num_hidden_layers"
    """Key of the config that says how many layers the list has."""


@dataclass(frozen=True)
class Variant:
    """Other stacks, for models whose config has `value` under `key`."""

    key: str
    value: object
    stacks: tuple[Stack, ...]


@dataclass(frozen=True)
class Family:
    """Where the heads, the neurons and the layers of one `model_type` are."""

    model_type: str
    stacks: tuple[Stack, ...]
    variants: tuple[Variant, ...] = ()

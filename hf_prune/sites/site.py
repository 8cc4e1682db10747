"""A site: all units of one kind in one block of one layer, and what each of them owns. Data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Unit `u` owns `offset + [u * width, (u + 1) * width)` on one axis of one module's weight.

    `axis` is that of the logical `[out, in]` matrix: 0 narrows outputs (and the bias), 1 inputs.
    Where `parameter` is given, the slice is of that parameter of the module, and `axis` is its own.
    """

    module: str
    axis: int
    width: int
    offset: int = 0
    parameter: str = ""


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that holds `per_unit` times the number of units.

    A name that begins with `config.` is a key of the module's config, of which the module then has
    a view of its own.
    """

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class Site:
    """All units of one kind in one block of one layer.

    `gate` is the slice whose columns the units feed; criteria read it and masks act on its input.
    Costs are per unit: `parameters`, `macs_per_token`, and `attention_width`, the width that enters
    the quadratic part of attention (zero for neurons).
    """

    name: str
    kind: str
    layer: int
    units: int
    slices: tuple[Slice, ...]
    gate: Slice
    attributes: tuple[Attribute, ...]
    parameters: int
    macs_per_token: int
    attention_width: int
    layer_module: str
    sum_module: str
    """Module whose input is the sum of residual and output; "" = that sum is the layer's output."""
    floor: int = 0
    """Units that must stay."""
    multiple: int = 1
    """The number of units that stay must be a multiple of this."""
    runs: int = 1
    """How often one pass runs the layer: more than once where layers are shared."""
    core: str = ""
    """Module that takes the heads apart; "" where the units are no heads."""
    shared_bias: str = ""
    """How a position bias that all layers share reaches `core`; "" where there is none."""
    empty: str = ""
    """What `core` becomes where no head is left; "" = nothing needs to."""
    cross: bool = False
    """Whether the heads look at another sequence than their own."""
    sizes: tuple[tuple[str, int], ...] = ()
    """Keys of the config, and how many times the number of units each holds, by which it can say
    that number for all layers alike; () = it cannot."""
    stack: str = ""
    """The list that the layer is in: encoder and decoder are two."""
    square: int = 0
    """Parameters that belong to each pair of units, where both axes of a matrix are of the site."""
    depth: int = 0
    """How many layers that list has."""
    reads: tuple[int, ...] = ()
    """Of query heads: the key/value head that each one reads."""
    read: tuple[Slice, ...] = ()
    """Of query heads: what key/value heads own. A head that no query is left for goes, too."""


@dataclass(frozen=True)
class Layer:
    """One layer of a list of layers."""

    name: str
    """Path from the base model."""
    list: str
    """Path of the list that it is in."""
    outputs: tuple[str, ...]
    """Its output projections: of attention, of cross-attention, of the feed-forward block."""
    length: str
    """Key of the config that says how many layers the list has; "" = none does."""


QUERY_HEADS = "query_heads"
"""Single query heads where several share keys and values."""
HIDDEN = "hidden"
"""The kind, and the name, of the one site of the hidden width."""
KINDS = ("heads", "neurons")
"""What is found if nothing else is asked for."""
EXPERT_KINDS = ("expert_neurons", "experts")
"""Units of fused experts, which are parameters and not linear layers."""
ALL_KINDS = (*KINDS, *EXPERT_KINDS)
"""Every kind of unit that belongs to one block."""

"""What can go: the sites of a model, with the slices of the weights that each of their units owns.

This is the only module that reads `families`. Everything after it works on slices and never asks
which family a model is of. All names are relative to the base model, so that what is said about
`BertForSequenceClassification` also holds for `BertModel`.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import UnsupportedModelError
from hf_prune.families import get_family
from hf_prune.families.spec import Attention, Experts, Ffn, Stack


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


KINDS = ("heads", "neurons")
"""What is found if nothing else is asked for."""
ALL_KINDS = (*KINDS, "expert_neurons", "experts")
"""Every kind of unit."""


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its task head (itself, if it has none).

    Raises:
        UnsupportedModelError: for a wrapper, with what to do first.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers PreTrainedModel. Unwrap it first: "
            "`.module` of DistributedDataParallel, `._orig_mod` of torch.compile, "
            "`.merge_and_unload()` of PEFT."
        )
    base = model.base_model
    return base if isinstance(base, PreTrainedModel) else model


def check_not_quantized(model: PreTrainedModel) -> None:
    """Refuse a quantized model, whose weights are not plain matrices.

    Raises:
        UnsupportedModelError: with what to do first.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            "the model is quantized. Prune first, then quantize: load it without "
            "quantization_config."
        )


def get_module(root: nn.Module, name: str) -> nn.Module:
    """The submodule at a dotted path.

    Raises:
        UnsupportedModelError: when the model has no such module.
    """
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(root).__name__} has no module {name!r}: its layout is not the one that "
            "its family description states."
        ) from error


def projection(root: nn.Module, name: str) -> "nn.Linear | Conv1D":
    """The linear layer at a dotted path.

    Raises:
        UnsupportedModelError: when the module there is not a plain `Linear` or `Conv1D`.
    """
    module = get_module(root, name)
    emptied = isinstance(module, Conv1D) and not module.nx  # it runs as a class of its own
    if type(module) not in (nn.Linear, Conv1D) and not emptied:
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not a plain Linear or Conv1D. Merge adapters "
            "(`merge_and_unload`) and prune before quantizing."
        )
    return module  # type: ignore[return-value]  # checked above


def logical_weight(module: nn.Module, *, gradient: bool = False) -> Tensor:
    """The weight of a `Linear` or `Conv1D`, or its gradient, as `[out, in]`.

    The one place that undoes the storage of `Conv1D`. A gradient that is not there is zero.
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(f"expected a weight, found {type(weight).__name__}.")
    if gradient:
        weight = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return weight.T if isinstance(module, Conv1D) else weight


def out_features(module: nn.Module) -> int:
    """Width of the output of a `Linear` or `Conv1D`."""
    return int(logical_weight(module).shape[0])


def gate_weight(root: nn.Module, site: Site) -> Tensor:
    """The entries that each unit owns in what its gate acts on, `[U, N]`.

    For heads and neurons these are columns of the output projection, `N = width * E`.
    """
    if site.gate.parameter:
        parameter = get_parameter(root, site.gate)
        stored: Tensor = parameter.movedim(site.gate.axis, 0).flatten(1)  # [..., U, ...] -> [U, N]
        return stored
    weight = logical_weight(projection(root, site.gate.module))  # [E, U * D]
    by_unit = weight.unflatten(1, (site.units, site.gate.width))  # [E, U, D]
    result: Tensor = by_unit.transpose(0, 1).flatten(1)  # [U, N] with N = E * D
    return result


def get_parameter(root: nn.Module, item: Slice) -> nn.Parameter:
    """The parameter that a slice with a `parameter` is of.

    Raises:
        UnsupportedModelError: when the module does not have it.
    """
    found = getattr(get_module(root, item.module), item.parameter, None)
    if not isinstance(found, nn.Parameter):
        raise UnsupportedModelError(
            f"{item.module} has no parameter {item.parameter!r}: its layout is not the one that "
            "its family description states."
        )
    return found


def join(*parts: str) -> str:
    """A dotted path, of which parts may be empty."""
    return ".".join(part for part in parts if part)


@dataclass(frozen=True)
class _Place:
    """One layer: where it is, its number in the model, how often a pass runs it."""

    stack: Stack
    name: str
    layer: int
    runs: int

    def site(
        self, root: nn.Module, spec: "Attention | Ffn", slices: Sequence[Slice], **rest: Any
    ) -> Site:
        """A site of this layer whose last slice is its gate."""
        parameters, macs = _unit_cost(root, slices)
        return Site(
            layer=self.layer,
            slices=tuple(slices),
            gate=slices[-1],
            parameters=parameters,
            macs_per_token=self.runs * macs,
            layer_module=self.name,
            sum_module=join(self.name, spec.sum) if spec.sum else "",
            runs=self.runs,
            stack=self.stack.layers,
            **rest,
        )


def _unit_cost(root: nn.Module, slices: Sequence[Slice]) -> tuple[int, int]:
    parameters, macs = 0, 0
    for item in slices:
        module = projection(root, item.module)
        weight = logical_weight(module)
        entries = item.width * int(weight.shape[1 - item.axis])
        macs += entries
        parameters += entries + (item.width if item.axis == 0 and module.bias is not None else 0)
    return parameters, macs


def _packed_slices(
    root: nn.Module, block: str, spec: Attention, head_dim: int, queries: int
) -> list[Slice]:
    """Slices of a projection that packs queries, keys and values."""
    name = join(block, spec.qkv)
    keys = (out_features(projection(root, name)) - queries) // 2
    if spec.interleaved:
        return [Slice(name, 0, 3 * head_dim)]
    group = queries // max(keys, 1)  # query heads per key/value head
    return [
        Slice(name, 0, group * head_dim),
        Slice(name, 0, head_dim, queries),
        Slice(name, 0, head_dim, queries + keys),
    ]


def _attention_slices(
    root: nn.Module, block: str, spec: Attention, head_dim: int, queries: int
) -> list[Slice]:
    """The slices of all projections into a block, `queries` its width; the first is of queries."""
    if spec.qkv:
        return _packed_slices(root, block, spec, head_dim, queries)
    if spec.kv:
        pair = join(block, spec.kv)
        keys = out_features(projection(root, pair)) // 2
        others = [Slice(pair, 0, head_dim), Slice(pair, 0, head_dim, keys)]
    else:
        keys = out_features(projection(root, join(block, spec.k)))
        others = [Slice(join(block, name), 0, head_dim) for name in (spec.k, spec.v)]
    group = queries // max(keys, 1)
    more = [name for name in (join(block, m) for m in spec.more) if has_module(root, name)]
    return [
        Slice(join(block, spec.q), 0, group * head_dim),
        *others,
        *(Slice(name, 0, group * head_dim) for name in more),
    ]


def _head_site(root: nn.Module, place: _Place, spec: Attention) -> Site | None:
    block = join(place.name, spec.path)
    core = join(block, spec.core)
    head_dim = spec.head_dim
    if isinstance(head_dim, str):
        head_dim = int(getattr(get_module(root, core), head_dim))
    out = join(block, spec.out)
    queries = int(logical_weight(projection(root, out)).shape[1])
    if not queries:  # no head is left
        return None
    slices = _attention_slices(root, block, spec, head_dim, queries)
    width = head_dim if spec.interleaved else slices[0].width  # of the query heads of a unit
    group = width // head_dim
    attributes = [Attribute(core, name, group) for name in spec.counts]
    attributes += [Attribute(core, name, width) for name in spec.widths]
    attributes += [Attribute(core, name, 1) for name in spec.kv_counts]
    attributes += [Attribute(core, f"config.{name}", group) for name in spec.config_counts]
    return place.site(
        root,
        spec,
        [*slices, Slice(out, 1, width)],
        name=block,
        kind="heads",
        units=queries // width,
        attributes=tuple(attributes),
        attention_width=place.runs * width,
        core=core,
        shared_bias=spec.shared_bias,
        sizes=((spec.sizes[0], group), (spec.sizes[1], 1)) if spec.sizes else (),
        empty=spec.empty,
        cross=spec is place.stack.cross,
    )


def _neuron_site(root: nn.Module, place: _Place, spec: Ffn) -> Site | None:
    gate = Slice(join(place.name, spec.down), 1, 1)
    units = int(logical_weight(projection(root, gate.module)).shape[1])
    if not units:  # no neuron is left
        return None
    names = [join(place.name, name) for name in spec.up]
    slices = [Slice(name, 0, 1, part * units) for name in names for part in range(spec.packed)]
    module = join(place.name, spec.path)
    return place.site(
        root,
        spec,
        [*slices, gate],
        name=join(place.name, "ffn"),
        kind="neurons",
        units=units,
        attributes=tuple(Attribute(module, name, 1) for name in spec.counts),
        attention_width=0,
        sizes=((spec.size, 1),),
    )


GROUPED_MULTIPLE = 8
"""Widths of fused experts: grouped matrix products need rows of a multiple of 16 bytes."""


def _expert_sites(root: nn.Module, place: _Place, spec: Experts) -> Iterator[Site]:
    """The neurons that all experts of a layer have in common, and the experts themselves."""
    path, router = join(place.name, spec.path), join(place.name, spec.router)
    experts, width, neurons = get_parameter(root, Slice(path, 0, 1, 0, spec.down)).shape
    up = get_parameter(root, Slice(path, 0, 1, 0, spec.up))
    chosen = int(getattr(get_module(root, router), spec.chosen))
    packed = up.shape[1] // neurons
    here: dict[str, Any] = {
        "layer": place.layer,
        "layer_module": place.name,
        "sum_module": join(place.name, spec.sum) if spec.sum else "",
        "attention_width": 0,
        "stack": place.stack.layers,
    }
    parts = [Slice(path, 1, 1, part * neurons, spec.up) for part in range(packed)]
    yield Site(
        name=join(place.name, "ffn"),
        kind="expert_neurons",
        units=neurons,
        slices=(*parts, Slice(path, 2, 1, 0, spec.down)),
        gate=Slice(path, 2, 1, 0, spec.down),
        attributes=tuple(Attribute(path, name, 1) for name in spec.widths),
        parameters=(packed + 1) * experts * width,
        macs_per_token=(packed + 1) * chosen * width,
        floor=min(GROUPED_MULTIPLE, neurons),
        multiple=GROUPED_MULTIPLE,
        sizes=((spec.sizes[1], 1),),
        **here,
    )
    yield Site(
        name=join(place.name, "experts"),
        kind="experts",
        units=experts,
        slices=(
            Slice(path, 0, 1, 0, spec.up),
            Slice(router, 0, 1, 0, "weight"),
            Slice(path, 0, 1, 0, spec.down),
        ),
        gate=Slice(path, 0, 1, 0, spec.down),
        attributes=tuple(Attribute(m, name, 1) for m in (path, router) for name in spec.counts),
        parameters=(packed + 1) * neurons * width + width,
        macs_per_token=width,  # of the router: each token still goes to as many experts
        floor=chosen,
        sizes=((spec.sizes[0], 1),),
        core=router,
        **here,
    )


def _stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    check_not_quantized(model)
    family = get_family(model.config.model_type)
    for variant in family.variants:
        if getattr(model.config, variant.key, None) == variant.value:
            return variant.stacks
    return family.stacks


def has_module(root: nn.Module, name: str) -> bool:
    """Whether there is a module at a dotted path."""
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _lists(base: nn.Module, stack: Stack) -> list[str]:
    """The paths of the layer lists of a stack; none, if the model does not have it."""
    before, star, after = stack.layers.partition(".*.")
    if not star:
        return [before] if has_module(base, before) else []
    if not has_module(base, before):
        return []
    groups = get_module(base, before)
    assert isinstance(groups, nn.ModuleList)  # noqa: S101  # a list of lists
    return [f"{before}.{index}.{after}" for index in range(len(groups))]


def _places(model: PreTrainedModel) -> Iterator[_Place]:
    """The layers of a model, stack by stack.

    Raises:
        UnsupportedModelError: when no stack of the family is there.
    """
    base = base_model(model)
    stacks = _stacks(model)
    found = False
    for stack in stacks:
        lists = _lists(base, stack)
        number = 0
        for group, path in enumerate(lists):
            layers = get_module(base, path)
            assert isinstance(layers, nn.ModuleList)  # noqa: S101  # what every layer list of transformers is
            depth = int(getattr(model.config, stack.depth)) if stack.depth else len(lists)
            # a depth belongs to the group in whose share of all depths it lies
            runs = sum(int(i / (depth / len(lists))) == group for i in range(depth))
            for index in range(len(layers)):
                yield _Place(stack, f"{path}.{index}", number, runs)
                found, number = True, number + 1
    if not found:
        names = " or ".join(stack.layers for stack in stacks)
        raise UnsupportedModelError(
            f"{type(base).__name__} has no layers at {names}: its layout is not the one that its "
            "family description states."
        )


def _sites_of(base: nn.Module, place: _Place) -> Iterator[Site | None]:
    """Everything that can go in one layer, in the order in which the layer runs it."""
    stack = place.stack
    yield _head_site(base, place, stack.attention)
    if stack.cross and has_module(base, join(place.name, stack.cross.path)):
        yield _head_site(base, place, stack.cross)
    if stack.experts and has_module(base, join(place.name, stack.experts.path)):
        yield from _expert_sites(base, place, stack.experts)
    elif stack.ffn:
        yield _neuron_site(base, place, stack.ffn)


def find_sites(
    model: PreTrainedModel,
    kinds: Sequence[str] = KINDS,
    ignore: Sequence[str] = (),
) -> list[Site]:
    """The sites of a model, layer by layer, attention before feed-forward. Empty ones are none.

    Args:
        model: a transformers model of a known family, with any head or none.
        kinds: of `ALL_KINDS`: `heads`, `neurons`; in a mixture of experts also `experts`, and
            `expert_neurons`, which all experts of a layer have in common.
        ignore: shell patterns of names to leave out, such as `encoder.layer.0.*`.

    Raises:
        UnsupportedModelError: for an unknown family, a wrapper, or an unexpected layout.
    """
    base = base_model(model)
    return [
        site
        for place in _places(model)
        for site in _sites_of(base, place)
        if site and site.kind in kinds and not any(fnmatch.fnmatch(site.name, p) for p in ignore)
    ]


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a model, in order: what `encoder_parameters` of a report counts."""
    base = base_model(model)
    return [get_module(base, place.name) for place in _places(model)]

"""The sites of a model, from the description of its family.

This room is the only one that reads `families`. Everything after it works on slices and never asks
which family a model is of. All names are relative to the base model, so that what is said about
`BertForSequenceClassification` also holds for `BertModel`.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.families import get_family
from hf_prune.families.spec import Experts, Ffn, Stack
from hf_prune.recipe import Names
from hf_prune.sites.heads import head_sites
from hf_prune.sites.hidden import find_module, hidden_site
from hf_prune.sites.modules import (
    base_model,
    check_not_quantized,
    get_module,
    get_parameter,
    has_module,
    logical_weight,
    projection,
)
from hf_prune.sites.place import Place, join
from hf_prune.sites.site import HIDDEN, KINDS, QUERY_HEADS, Attribute, Layer, Site, Slice


def _neuron_site(root: nn.Module, place: Place, spec: Ffn) -> Site | None:
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


def _expert_sites(root: nn.Module, place: Place, spec: Experts) -> Iterator[Site]:
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
        "depth": place.depth,
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


def _layer_list(base: nn.Module, path: str) -> nn.ModuleList:
    layers = get_module(base, path)
    assert isinstance(layers, nn.ModuleList)  # noqa: S101  # what every layer list of transformers is
    return layers


def _places(model: PreTrainedModel) -> Iterator[Place]:
    """The layers of a model, stack by stack.

    Raises:
        UnsupportedModelError: when no stack of the family is there.
    """
    base = base_model(model)
    stacks = _stacks(model)
    found = False
    for stack in stacks:
        lists = _lists(base, stack)
        number, all_layers = 0, sum(len(_layer_list(base, path)) for path in lists)
        for group, path in enumerate(lists):
            layers = _layer_list(base, path)
            depth = int(getattr(model.config, stack.depth)) if stack.depth else len(lists)
            # a depth belongs to the group in whose share of all depths it lies
            runs = sum(int(i / (depth / len(lists))) == group for i in range(depth))
            for index in range(len(layers)):
                yield Place(stack, f"{path}.{index}", number, runs, all_layers)
                found, number = True, number + 1
    if not found:
        names = " or ".join(stack.layers for stack in stacks)
        raise UnsupportedModelError(
            f"{type(base).__name__} has no layers at {names}: its layout is not the one that its "
            "family description states."
        )


def _sites_of(base: nn.Module, place: Place, kinds: Sequence[str]) -> Iterator[Site | None]:
    """Everything that can go in one layer, in the order in which the layer runs it."""
    stack = place.stack
    yield from head_sites(base, place, stack.attention, kinds)
    if stack.cross and has_module(base, join(place.name, stack.cross.path)):
        yield from head_sites(base, place, stack.cross, kinds)
    if stack.experts and has_module(base, join(place.name, stack.experts.path)):
        yield from _expert_sites(base, place, stack.experts)
    elif stack.ffn:
        yield _neuron_site(base, place, stack.ffn)


def _all_names(model: PreTrainedModel, sites: Sequence[Site], kinds: Sequence[str]) -> Names:
    """Every name in a model: of its sites, of what holds parts of them, and of the rest.

    Args:
        model: with any head or none.
        sites: all of it.
        kinds: those that can go.
    """
    base = base_model(model)
    also = {HIDDEN}  # and those of blocks in which nothing is left
    for place in _places(model):
        blocks = [block for block in (place.stack.attention, place.stack.cross) if block]
        also |= {join(place.name, name) for name in (*(b.path for b in blocks), "ffn", "experts")}
    owned = [item.module for site in sites if site.kind in kinds for item in site.slices]
    inside = {id(find_module(model, name)) for name in owned}
    holding: set[str] = set()
    others: set[str] = set()
    for root in (base, model):
        for name, module in root.named_modules():
            holds = any(id(part) in inside for part in module.modules())
            own = (join(name, parameter) for parameter in module._parameters)
            (holding if holds else others).update((name, type(module).__name__, *own))
    known = [site.name for site in sites]
    return Names(known, also, holding - also, others - holding - also)


def find_sites(
    model: PreTrainedModel,
    kinds: Sequence[str] = KINDS,
    ignore: Sequence[str] = (),
) -> list[Site]:
    """The sites of a model, layer by layer, attention before feed-forward. Empty ones are none.

    Args:
        model: a transformers model of a known family, with any head or none.
        kinds: of `ALL_KINDS`: `heads`, `neurons`; in a mixture of experts also `experts`, and
            `expert_neurons`, which all experts of a layer have in common. Or `query_heads`: single
            ones, where several share keys and values; they stand for the `heads` of an attention in
            which groups differ by now. Or `hidden`: one site of the whole model, that comes last.
        ignore: shell patterns of names to leave out, such as `encoder.layer.0.*`.

    Raises:
        ConfigError: when a pattern to be ignored fits nothing at all.
        UnsupportedModelError: for an unknown family, a wrapper, or an unexpected layout.
    """
    base = base_model(model)
    found = [site for place in _places(model) for site in _sites_of(base, place, kinds) if site]
    if HIDDEN in kinds:
        found.append(hidden_site(model, found))
    if ignore:
        _all_names(model, found, kinds).check_ignored(ignore)
    return [
        site
        for site in found
        if (site.kind in kinds or (site.kind == QUERY_HEADS and "heads" in kinds))
        and not any(fnmatch.fnmatch(site.name, pattern) for pattern in ignore)
    ]


def _outputs(stack: Stack) -> list[str]:
    blocks = [block for block in (stack.attention, stack.cross) if block]
    return [join(block.path, block.out) for block in blocks] + (
        [stack.ffn.down] if stack.ffn else []
    )


def find_layers(model: PreTrainedModel) -> list[Layer]:
    """The transformer layers of a model, in order.

    Raises:
        UnsupportedModelError: as `find_sites`.
    """
    base, layers = base_model(model), []
    for place in _places(model):
        paths = (join(place.name, name) for name in _outputs(place.stack))
        outputs = tuple(path for path in paths if has_module(base, path))
        length = "" if place.stack.depth else place.stack.length
        layers.append(Layer(place.name, place.name.rpartition(".")[0], outputs, length))
    return layers


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a model, in order: what `encoder_parameters` of a report counts."""
    base = base_model(model)
    return [get_module(base, place.name) for place in _places(model)]

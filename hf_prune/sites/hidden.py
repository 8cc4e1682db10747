"""The hidden width of a whole model as one site: its units are the channels of the residual stream.

Every axis of that size belongs to it, in embeddings, norms, projections and task heads, but for the
inner axes of blocks (heads, neurons, experts) and for vocabularies. So it needs no description of a
family: it follows from the other sites.
"""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites.modules import base_model, get_module, logical_weight, projection
from hf_prune.sites.site import HIDDEN, Attribute, Site, Slice

COUNTS = ("hidden_dim",)
"""Attributes in which modules keep the hidden width for their own computations."""


def hidden_width(model: PreTrainedModel, sites: Sequence[Site]) -> int:
    """The number of channels of the residual stream, as it is now.

    Args:
        model: that the sites are of.
        sites: of all kinds.

    Raises:
        UnsupportedModelError: when stacks differ in it, or nothing is left to read it from.
    """
    base = base_model(model)
    gates = [site.gate.module for site in sites if not site.gate.parameter]
    widths = {int(logical_weight(projection(base, name)).shape[0]) for name in gates}
    parts = [name for name in model.config.sub_configs if "vision" in name or "audio" in name]
    if len(widths) != 1 or parts:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no hidden width that all of its parts share: "
            f"{sorted(widths)}{', beside ' + ', '.join(parts) if parts else ''}. Prune heads and "
            "neurons."
        )
    return widths.pop()


def _named(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """All modules by their path from the base model, or `/` and their path from the model."""
    base = base_model(model)
    yield from base.named_modules()
    if base is not model:
        inside = {id(module) for module in base.modules()}
        for name, module in model.named_modules():
            if name and id(module) not in inside:
                yield f"/{name}", module


def _axes(module: nn.Module, width: int, output: nn.Module | None) -> Iterator[tuple[str, int]]:
    """The parameter and axis (of the logical matrix, where the module is linear) of that width."""
    if isinstance(module, (nn.Linear, Conv1D)):
        out, inputs = logical_weight(module).shape
        if out == width and module is not output:
            yield "", 0
        if inputs == width:
            yield "", 1
        return
    for name, parameter in module._parameters.items():
        for axis, size in enumerate(parameter.shape if parameter is not None else ()):
            table = isinstance(module, nn.Embedding) and axis == 0
            if size == width and not table:
                yield name, axis


def _check_axes(name: str, module: nn.Module, axes: Sequence[tuple[str, int]]) -> None:
    mixes = isinstance(module, (nn.Conv1d, nn.Conv2d)) and ("weight", 1) in axes
    grouped = isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1
    odd = hasattr(module, "parametrizations")
    if axes and (mixes or grouped or odd):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} over the hidden width, which cannot be narrowed. "
            "Prune heads and neurons."
        )


def _slices(model: PreTrainedModel, sites: Sequence[Site], width: int) -> list[Slice]:
    """Every axis of that size which is one of channels."""
    output = model.get_output_embeddings()
    owned = (item for site in sites for item in (*site.slices, *site.read))
    inner = {(item.module, item.parameter, item.axis) for item in owned}
    slices: list[Slice] = []
    for name, module in _named(model):
        axes = [
            (parameter, axis)
            for parameter, axis in _axes(module, width, output)
            if (name, parameter, axis) not in inner
        ]
        _check_axes(name, module, axes)
        slices += [Slice(name, axis, 1, 0, parameter) for parameter, axis in axes]
    return slices


def _costs(model: PreTrainedModel, slices: Sequence[Slice], width: int) -> tuple[int, int]:
    """Parameters that each channel has, and those that it has with each other one; tied ones once.

    Returns:
        What is multiplied with the number of channels, and what with its square.
    """
    axes: dict[tuple[str, str], set[int]] = {}
    for item in slices:
        axes.setdefault((item.module, item.parameter), set()).add(item.axis)
    seen: set[int] = set()
    linear, square = 0, 0
    for (name, parameter), both in axes.items():
        module = find_module(model, name)
        stored = getattr(module, parameter or "weight")
        if not parameter and 0 in both and module.bias is not None:
            linear += 1
        if id(stored) in seen:  # tied
            continue
        seen.add(id(stored))
        if len(both) == 2:
            square += stored.numel() // width**2
        else:
            linear += stored.numel() // width
    return linear, square


def hidden_site(model: PreTrainedModel, sites: Sequence[Site]) -> Site:
    """The one site of the hidden width.

    Args:
        model: with any head or none.
        sites: of it, of all other kinds.

    Raises:
        UnsupportedModelError: when parts of the model have other widths, or mix channels.
    """
    width = hidden_width(model, sites)
    slices = _slices(model, sites, width)
    linear, square = _costs(model, slices, width)
    attributes = tuple(
        Attribute(name, key, 1)
        for name, module in base_model(model).named_modules()
        for key in COUNTS
        if vars(module).get(key) == width
    )
    multiple = max(site.multiple for site in sites)  # fused experts need it on all of their axes
    return Site(
        name=HIDDEN,
        kind=HIDDEN,
        layer=0,
        units=width,
        slices=tuple(slices),
        gate=next(item for item in slices if not item.parameter and item.axis == 1),
        attributes=attributes,
        parameters=linear,
        square=square,
        floor=multiple,
        multiple=multiple,
        macs_per_token=0,
        attention_width=0,
        layer_module="",
        sum_module="",
    )


def find_module(model: PreTrainedModel, name: str) -> nn.Module:
    """The module of a slice of the hidden width, inside the base model or outside of it."""
    if name.startswith("/"):
        return get_module(model, name.removeprefix("/"))
    return get_module(base_model(model), name)


def readers(site: Site) -> list[str]:
    """The linear layers that read the hidden width."""
    return [item.module for item in site.slices if not item.parameter and item.axis == 1]


def norms(model: PreTrainedModel, site: Site) -> list[str]:
    """The modules that scale the channels of the hidden width: norms, and what acts like one."""
    names = dict.fromkeys(item.module for item in site.slices if item.parameter == "weight")
    found = ((name, find_module(model, name)) for name in names)
    return [name for name, module in found if module.weight.ndim == 1]

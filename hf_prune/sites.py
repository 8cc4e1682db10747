"""What can go: the sites of a model, with the slices of the weights that each of their units owns.

This is the only module that reads `families`. Everything after it works on slices and never asks
which family a model is of. All names are relative to the base model, so that what is said about
`BertForSequenceClassification` also holds for `BertModel`.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import UnsupportedModelError
from hf_prune.families import get_family
from hf_prune.families.spec import Attention, Ffn, Stack


@dataclass(frozen=True)
class Slice:
    """Unit `u` owns `offset + [u * width, (u + 1) * width)` on one axis of one module's weight.

    `axis` is that of the logical `[out, in]` matrix: 0 narrows outputs (and the bias), 1 inputs.
    """

    module: str
    axis: int
    width: int
    offset: int = 0


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that holds `per_unit` times the number of units."""

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
    if type(module) not in (nn.Linear, Conv1D):
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
    """The entries that each unit owns in its output projection, `[U, N]` with `N = width * E`."""
    weight = logical_weight(projection(root, site.gate.module))  # [E, U * D]
    by_unit = weight.unflatten(1, (site.units, site.gate.width))  # [E, U, D]
    result: Tensor = by_unit.transpose(0, 1).flatten(1)  # [U, N] with N = E * D
    return result


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _unit_cost(root: nn.Module, slices: Sequence[Slice]) -> tuple[int, int]:
    parameters, macs = 0, 0
    for item in slices:
        module = projection(root, item.module)
        weight = logical_weight(module)
        entries = item.width * int(weight.shape[1 - item.axis])
        macs += entries
        parameters += entries + (item.width if item.axis == 0 and module.bias is not None else 0)
    return parameters, macs


def _attention_slices(root: nn.Module, block: str, spec: Attention, head_dim: int) -> list[Slice]:
    if spec.qkv:
        name = _join(block, spec.qkv)
        packed = out_features(projection(root, name)) // 3
        return [Slice(name, 0, head_dim, offset) for offset in (0, packed, 2 * packed)]
    queries = out_features(projection(root, _join(block, spec.q)))
    keys = out_features(projection(root, _join(block, spec.k)))
    group = queries // keys  # query heads per key/value head; 1 without grouped queries
    widths = {spec.q: group * head_dim, spec.k: head_dim, spec.v: head_dim}
    return [Slice(_join(block, name), 0, width) for name, width in widths.items()]


def _head_site(root: nn.Module, stack: Stack, layer: int) -> Site:
    spec = stack.attention
    layer_name = f"{stack.layers}.{layer}"
    block = _join(layer_name, spec.path)
    core = _join(block, spec.core)
    head_dim = int(getattr(get_module(root, core), spec.head_dim))
    slices = _attention_slices(root, block, spec, head_dim)
    width = slices[0].width  # of all query heads that a unit holds
    out = projection(root, _join(block, spec.out))
    units = int(logical_weight(out).shape[1]) // width
    gate = Slice(_join(block, spec.out), 1, width)
    parameters, macs = _unit_cost(root, [*slices, gate])
    attributes = [Attribute(core, name, width // head_dim) for name in spec.counts]
    attributes += [Attribute(core, name, width) for name in spec.widths]
    return Site(
        name=block,
        kind="heads",
        layer=layer,
        units=units,
        slices=(*slices, gate),
        gate=gate,
        attributes=tuple(attributes),
        parameters=parameters,
        macs_per_token=macs,
        attention_width=width,
        layer_module=layer_name,
        sum_module=_join(layer_name, spec.sum) if spec.sum else "",
    )


def _neuron_site(root: nn.Module, stack: Stack, layer: int) -> Site:
    spec: Ffn = stack.ffn
    layer_name = f"{stack.layers}.{layer}"
    slices = [Slice(_join(layer_name, name), 0, 1) for name in spec.up]
    gate = Slice(_join(layer_name, spec.down), 1, 1)
    units = int(logical_weight(projection(root, gate.module)).shape[1])
    parameters, macs = _unit_cost(root, [*slices, gate])
    module = _join(layer_name, spec.path)
    return Site(
        name=_join(layer_name, "ffn"),
        kind="neurons",
        layer=layer,
        units=units,
        slices=(*slices, gate),
        gate=gate,
        attributes=tuple(Attribute(module, name, 1) for name in spec.counts),
        parameters=parameters,
        macs_per_token=macs,
        attention_width=0,
        layer_module=layer_name,
        sum_module=_join(layer_name, spec.sum) if spec.sum else "",
    )


def _stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    check_not_quantized(model)
    if getattr(model.config, "add_cross_attention", False):
        raise UnsupportedModelError(
            "config.add_cross_attention is on: cross-attention of this family is not described yet."
        )
    return get_family(model.config.model_type).stacks


def _layers(model: PreTrainedModel) -> Iterator[tuple[Stack, int]]:
    base = base_model(model)
    for stack in _stacks(model):
        layers = get_module(base, stack.layers)
        assert isinstance(layers, nn.ModuleList)  # noqa: S101  # what every layer list of transformers is
        for index in range(len(layers)):
            yield stack, index


def find_sites(
    model: PreTrainedModel,
    kinds: Sequence[str] = ("heads", "neurons"),
    ignore: Sequence[str] = (),
) -> list[Site]:
    """The sites of a model, layer by layer, attention before feed-forward.

    Args:
        model: a transformers model of a known family, with any head or none.
        kinds: `heads`, `neurons`, or both.
        ignore: shell patterns of names to leave out, such as `encoder.layer.0.*`.

    Raises:
        UnsupportedModelError: for an unknown family, a wrapper, or an unexpected layout.
    """
    base = base_model(model)
    sites = []
    for stack, layer in _layers(model):
        found = [
            build(base, stack, layer)
            for kind, build in (("heads", _head_site), ("neurons", _neuron_site))
            if kind in kinds
        ]
        sites += [s for s in found if not any(fnmatch.fnmatch(s.name, p) for p in ignore)]
    return sites


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a model, in order: what `encoder_parameters` of a report counts."""
    base = base_model(model)
    return [get_module(base, f"{stack.layers}.{layer}") for stack, layer in _layers(model)]

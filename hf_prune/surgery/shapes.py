"""Widths written down: what a pruned model's config must say so that it can be built again.

The description is keyed by module path from the base model, with absolute sizes. It needs no
knowledge of the family, and it is checked against the model in full before any of it is acted on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import CheckpointError
from hf_prune.sites import base_model, logical_weight

QUANT_METHOD = "hf_prune"
"""The name under which transformers finds our loader."""
SHAPES_VERSION = 1
"""Version of the description."""
MAX_ENTRIES = 1 << 20
"""More modules than any model has."""


def narrow_(module: nn.Module, axis: int, index: Tensor) -> None:
    """Keep some rows (`axis` 0, with the bias) or columns (`axis` 1) of a linear layer."""
    index = index.to(module.weight.device)  # type: ignore[arg-type]  # a parameter
    stored_axis = 1 - axis if isinstance(module, Conv1D) else axis
    for name, dim in (("weight", stored_axis), ("bias", 0)):
        old = getattr(module, name)
        if old is None or (name == "bias" and axis == 1):
            continue
        kept = old.detach().index_select(dim, index).contiguous()
        setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    _update_sizes(module)


def _update_sizes(module: nn.Module) -> None:
    """Make what a layer says of itself agree with its weight."""
    out, inputs = (int(size) for size in logical_weight(module).shape)
    if isinstance(module, Conv1D):
        module.nf, module.nx = out, inputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = out, inputs


def _entries(shapes: Mapping[str, Any], key: str) -> dict[str, dict[str, int]]:
    value = shapes.get(key, {})
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise CheckpointError(f"quantization_config.{key} is not a table of modules.")
    for module, entry in value.items():
        where = f"quantization_config.{key}[{module!r}]"
        if not isinstance(module, str) or not isinstance(entry, dict):
            raise CheckpointError(f"{where} is not a table.")
        for name, size in entry.items():
            if not isinstance(name, str) or isinstance(size, bool) or not isinstance(size, int):
                raise CheckpointError(f"{where}.{name} = {size!r} is not an integer.")
            if size < 1:
                raise CheckpointError(f"{where}.{name} = {size} is not positive.")
    return value


def check_shapes(shapes: Mapping[str, Any]) -> None:
    """Check a description by itself: version, kinds of value, signs.

    Raises:
        CheckpointError: naming the key.
    """
    version = shapes.get("version")
    if type(version) is not int or version != SHAPES_VERSION:
        raise CheckpointError(
            f"quantization_config.version is {shapes.get('version')!r}; this hf_prune reads "
            f"version {SHAPES_VERSION}. A newer checkpoint needs a newer hf_prune."
        )
    for name, entry in _entries(shapes, "modules").items():
        if set(entry) != {"out", "in"}:
            raise CheckpointError(
                f"quantization_config.modules[{name!r}] must have 'out' and 'in'."
            )
    _entries(shapes, "attributes")


def _resolve(base: nn.Module, name: str) -> nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"quantization_config names {name!r}, and {type(base).__name__} has no such module."
        ) from error


def _check_module(name: str, module: nn.Module, entry: Mapping[str, int]) -> None:
    if type(module) not in (nn.Linear, Conv1D):
        raise CheckpointError(
            f"{name} is a {type(module).__name__}; only Linear and Conv1D are resized."
        )
    out, inputs = logical_weight(module).shape
    if entry["out"] > out or entry["in"] > inputs:
        raise CheckpointError(
            f"{name}: the config asks for [{entry['out']}, {entry['in']}], the model has only "
            f"[{out}, {inputs}]. Pruning makes matrices smaller."
        )


def _check_attribute(name: str, module: nn.Module, attribute: str, value: int) -> None:
    current = vars(module).get(attribute)
    if isinstance(current, bool) or not isinstance(current, int) or attribute.startswith("_"):
        raise CheckpointError(f"{name}.{attribute} is not a size that can be set.")
    if value > current:
        raise CheckpointError(f"{name}.{attribute} = {value} is larger than the model's {current}.")


def apply_shapes_(model: PreTrainedModel, shapes: Mapping[str, Any]) -> None:
    """Narrow a freshly built model (on `meta` or not) to the widths of a description.

    All of it is checked first; nothing is changed, and no memory allocated, when a part is wrong.

    Raises:
        CheckpointError: naming the key that is wrong.
    """
    check_shapes(shapes)
    base = base_model(model)
    modules = {name: _resolve(base, name) for name in shapes.get("modules", {})}
    holders = {name: _resolve(base, name) for name in shapes.get("attributes", {})}
    for name, module in modules.items():
        _check_module(name, module, shapes["modules"][name])
    for name, holder in holders.items():
        for attribute, value in shapes["attributes"][name].items():
            _check_attribute(name, holder, attribute, value)
    for name, module in modules.items():
        _resize_(module, **{f"{key}_": size for key, size in shapes["modules"][name].items()})
    for name, holder in holders.items():
        for attribute, value in shapes["attributes"][name].items():
            setattr(holder, attribute, value)


def _resize_(module: nn.Module, out_: int, in_: int) -> None:
    """Give a layer uninitialised weights of another size, where its weights are now."""
    old = module.weight
    assert isinstance(old, Tensor)  # noqa: S101  # checked by _check_module
    shape = (in_, out_) if isinstance(module, Conv1D) else (out_, in_)
    module.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
    if isinstance(module.bias, Tensor):
        module.bias = nn.Parameter(module.bias.new_empty(out_), requires_grad=old.requires_grad)
    _update_sizes(module)


def get_shapes(model: PreTrainedModel) -> dict[str, Any]:
    """The description that the model's config carries; an empty one, if it was never pruned."""
    config = getattr(model.config, "quantization_config", None)
    data = config if isinstance(config, Mapping) else config.to_dict() if config is not None else {}
    if data and data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"the config has a quantization_config of {data.get('quant_method')!r}: prune first, "
            "then quantize."
        )
    return {
        "quant_method": QUANT_METHOD,
        "version": SHAPES_VERSION,
        "modules": {name: dict(entry) for name, entry in data.get("modules", {}).items()},
        "attributes": {name: dict(entry) for name, entry in data.get("attributes", {}).items()},
    }


def record_shapes_(
    model: PreTrainedModel, modules: "set[str]", attributes: Mapping[str, Mapping[str, int]]
) -> None:
    """Write the present size of `modules`, and `attributes`, into the model's config.

    After this a plain `model.save_pretrained(...)` saves a model that can be loaded.
    """
    base = base_model(model)
    shapes = get_shapes(model)
    for name in sorted(modules):
        out, inputs = logical_weight(_resolve(base, name)).shape
        shapes["modules"][name] = {"out": int(out), "in": int(inputs)}
    for name, values in attributes.items():
        shapes["attributes"].setdefault(name, {}).update(values)
    model.config.quantization_config = shapes


def keep_index(size: int, drop: "list[int]") -> Tensor:
    """The positions of an axis that stay, `[kept]`, when `drop` go."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[drop] = False
    return mask.nonzero().flatten()

"""Building a model again from what its config says.

The description is checked against the model in full before any of it is acted on. It needs no
knowledge of the family.

This module is also saved beside models that are to load without hf_prune. So it imports nothing of
ours but an error, and what is saved with it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import CheckpointError
from hf_prune.surgery.description import KEY, check_shapes, is_size
from hf_prune.surgery.remade import (
    KEPT_HEADS,
    NoHeads,
    NoInputs,
    UnevenGroups,
    empty_,
    get_attribute,
    keep_heads_,
    set_attribute_,
    spread_,
)


def resolve(base: nn.Module, name: str) -> nn.Module:
    """The module that a description names.

    Args:
        base: the base model; or the whole model, for what is outside of its base model.
        name: path from `base`; the `/` that begins a path outside of the base model is left out.

    Raises:
        CheckpointError: when there is none.
    """
    try:
        return base.get_submodule(name.removeprefix("/"))
    except AttributeError as error:
        raise _no_module(base, name) from error


def _no_module(base: nn.Module, name: str) -> CheckpointError:
    return CheckpointError(f"{KEY} names {name!r}, and {type(base).__name__} has no such module.")


class _Modules:
    """The modules of a model by the paths of a description, looked up once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base: nn.Module = model.base_model
        self.inside: dict[str, nn.Module] = dict(self.base.named_modules(remove_duplicate=False))
        self.outside: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        table, root = self.inside, self.base
        if name.startswith("/"):  # a path from the whole model
            self.outside = self.outside or dict(self.model.named_modules(remove_duplicate=False))
            table, root = self.outside, self.model
        found = table.get(name.removeprefix("/"))
        if found is None:
            raise _no_module(root, name)
        return found

    def here(self, shapes: Mapping[str, Any], table: str) -> dict[str, Any]:
        """The entries of a table, without those of a task head that this model does not have."""
        entries: dict[str, Any] = shapes.get(table, {})
        if self.base is not self.model:
            return entries
        return {name: entry for name, entry in entries.items() if not name.startswith("/")}


def _sizes(module: nn.Module) -> tuple[int, int]:
    """The logical `[out, in]` of a `Linear` or `Conv1D`."""
    shape = module.weight.shape
    out, inputs = reversed(shape) if isinstance(module, Conv1D) else shape  # type: ignore[arg-type,misc]  # two sizes
    return int(out), int(inputs)


def _check_module(name: str, module: nn.Module, entry: Mapping[str, int]) -> None:
    if type(module) not in (nn.Linear, Conv1D):
        raise CheckpointError(
            f"{name} is a {type(module).__name__}; only Linear and Conv1D are resized."
        )
    out, inputs = _sizes(module)
    if entry["out"] > out or entry["in"] > inputs:
        raise CheckpointError(
            f"{name}: the config asks for [{entry['out']}, {entry['in']}], the model has only "
            f"[{out}, {inputs}]. Pruning makes matrices smaller."
        )


def _check_attribute(name: str, module: nn.Module, attribute: str, value: int) -> None:
    current = get_attribute(module, attribute)
    if not is_size(current) or attribute.startswith("_") or "._" in attribute:
        raise CheckpointError(f"{name}.{attribute} is not a size that can be set.")
    if value > current:
        raise CheckpointError(f"{name}.{attribute} = {value} is larger than the model's {current}.")


def _check_parameter(modules: _Modules, name: str, sizes: list[int]) -> None:
    path, _, last = name.rpartition(".")
    parameter = modules[path]._parameters.get(last)
    if parameter is None:
        raise CheckpointError(f"{KEY} names {name!r}, and the model has no such parameter.")
    has = list(parameter.shape)
    if len(sizes) != len(has) or any(a > b for a, b in zip(sizes, has, strict=True)):
        raise CheckpointError(
            f"{name}: the config asks for {sizes}, the model has only {has}. "
            "Pruning makes matrices smaller."
        )


def _check_kept(
    name: str, module: nn.Module, entry: Mapping[str, Any], attributes: Mapping[str, int]
) -> None:
    mixin, count = KEPT_HEADS[entry["bias"]]
    cls, needed = type(module), "compute_bias" if entry["bias"] == "t5" else "forward"
    current = vars(module).get(count)
    if issubclass(cls, mixin) or not hasattr(cls, needed) or not isinstance(current, int):
        raise CheckpointError(f"{name} is a {cls.__name__}, which shares no position bias.")
    if max(entry["kept"], default=0) >= current or len(entry["kept"]) != attributes.get(count):
        raise CheckpointError(
            f"{KEY}.heads[{name!r}].kept does not fit: {len(entry['kept'])} of {current} heads, "
            f"and {count} = {attributes.get(count)}."
        )


def _check_no_heads(name: str, module: nn.Module, entry: Mapping[str, Any]) -> None:
    out = vars(module)["_modules"].get(entry["out"])
    if entry["kind"] == "context":
        good = not entry["out"] and "Attention" in type(module).__name__
    else:
        good = type(out) in (nn.Linear, Conv1D)
    if entry["kind"] == "t5":
        good = good and hasattr(type(module), "compute_bias")
    if not good or isinstance(module, NoHeads):
        raise CheckpointError(
            f"{KEY}.empty[{name!r}] does not fit: {type(module).__name__} is no attention with an "
            f"output projection {entry['out']!r}."
        )


def _check_uneven(name: str, module: nn.Module, entry: Mapping[str, Any]) -> None:
    groups: Any = vars(module).get("num_key_value_groups")
    total: Any = getattr(vars(module).get("config"), "num_key_value_heads", None)
    if not is_size(groups) or not is_size(total) or isinstance(module, (UnevenGroups, NoHeads)):
        raise CheckpointError(f"{name} is a {type(module).__name__}, which has no groups of heads.")
    if entry["reads"][-1] >= total or len(entry["reads"]) > groups * total:
        raise CheckpointError(
            f"{KEY}.groups[{name!r}].reads does not fit: the model has {total} key/value heads, "
            f"each for {groups} query heads."
        )


def _check_all(modules: _Modules, shapes: Mapping[str, Any]) -> None:
    check_shapes(shapes)
    attributes = shapes.get("attributes", {})
    for name, entry in modules.here(shapes, "modules").items():
        _check_module(name, modules[name], entry)
    for name, entry in attributes.items():
        holder = modules[name]
        for attribute, value in entry.items():
            _check_attribute(name, holder, attribute, value)
    for name, sizes in modules.here(shapes, "parameters").items():
        _check_parameter(modules, name, sizes)
    for name, entry in shapes.get("heads", {}).items():
        _check_kept(name, modules[name], entry, attributes.get(name, {}))
    for name, entry in shapes.get("empty", {}).items():
        _check_no_heads(name, modules[name], entry)
    for name, entry in shapes.get("groups", {}).items():
        _check_uneven(name, modules[name], entry)


def apply_shapes_(model: PreTrainedModel, shapes: Mapping[str, Any]) -> None:
    """Narrow a freshly built model (on `meta` or not) to the widths of a description.

    All of it is checked first; nothing is changed, and no memory allocated, when a part is wrong.

    Raises:
        CheckpointError: naming the key that is wrong.
    """
    modules = _Modules(model)
    # while a model is built on `meta`, every look at a tensor passes a mode that chooses devices
    with torch._C.DisableTorchFunction():
        _check_all(modules, shapes)
        _apply_(modules, shapes)


def _apply_(modules: _Modules, shapes: Mapping[str, Any]) -> None:
    """Carry out a description that was checked."""
    for name, entry in modules.here(shapes, "modules").items():
        _resize_(modules[name], entry["out"], entry["in"])
    for name, sizes in modules.here(shapes, "parameters").items():
        path, _, last = name.rpartition(".")
        _renew_(modules[path], last, tuple(sizes))
        update_sizes_(modules[path])
    for name, entry in shapes.get("attributes", {}).items():
        for attribute, value in entry.items():
            set_attribute_(modules[name], attribute, value)
    for name, entry in shapes.get("heads", {}).items():
        keep_heads_(modules[name], entry["bias"], list(entry["kept"]))
    for name, entry in shapes.get("empty", {}).items():
        empty_(modules[name], entry["kind"], entry["out"], cross=entry["cross"])
    for name, entry in shapes.get("groups", {}).items():
        spread_(modules[name], list(entry["reads"]))


def update_sizes_(module: nn.Module) -> None:
    """Make what a layer says of itself agree with its weight."""
    if isinstance(module, Conv1D):
        module.nf, module.nx = _sizes(module)
        if not module.nx:
            module.__class__ = NoInputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = _sizes(module)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        module.out_channels = module.weight.shape[0]


def _renew_(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a parameter another size, uninitialised, where it is now."""
    old = module._parameters[name]
    if old is not None and old.shape != shape:
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def _resize_(module: nn.Module, out: int, inputs: int) -> None:
    _renew_(module, "weight", (inputs, out) if isinstance(module, Conv1D) else (out, inputs))
    _renew_(module, "bias", (out,))
    update_sizes_(module)

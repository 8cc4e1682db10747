"""The modules and weights that sites speak of: found by path, and read as `[out, in]`."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites.site import HIDDEN, Site, Slice


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


def has_module(root: nn.Module, name: str) -> bool:
    """Whether there is a module at a dotted path."""
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def gate_weight(root: nn.Module, site: Site) -> Tensor:
    """The entries that each unit owns in what its gate acts on, `[U, N]`.

    For heads and neurons these are columns of the output projection, `N = width * E`; for channels
    those of everything in the base model that reads them.
    """
    if site.kind == HIDDEN:
        names = [item.module for item in site.slices if not item.parameter and item.axis == 1]
        inside = [name for name in names if not name.startswith("/")]
        return torch.cat([logical_weight(projection(root, name)) for name in inside]).T
    if site.gate.parameter:
        parameter = get_parameter(root, site.gate)
        stored: Tensor = parameter.movedim(site.gate.axis, 0).flatten(1)  # [..., U, ...] -> [U, N]
        return stored
    weight = logical_weight(projection(root, site.gate.module))  # [E, U * D]
    by_unit = weight.unflatten(1, (site.units, site.gate.width))  # [E, U, D]
    result: Tensor = by_unit.transpose(0, 1).flatten(1)  # [U, N] with N = E * D
    return result

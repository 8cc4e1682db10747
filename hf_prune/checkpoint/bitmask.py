"""Bitmask storage: of a sparse matrix only what is not zero, and one bit for each entry.

A saved folder is rewritten after transformers has written it, and read back through a weight
conversion that the loader hook registers, so that plain `from_pretrained` gives ordinary dense
weights, bit for bit. Which entries are stored is read off the bits themselves, so that a negative
zero survives as well.

Where the hook is missing transformers would leave out what it does not know, and start weights at
random. So one of the packed weights has an empty tensor under its own name, which stops it.
"""

import json
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    revert_weight_conversion,
)

from hf_prune.checkpoint.hook import CONVERSIONS
from hf_prune.errors import CheckpointError
from hf_prune.surgery.description import PACKED
from hf_prune.surgery.shapes import get_shapes
from hf_prune.weights.masks import BITS

VALUES, MASK = "hf_prune_values", "hf_prune_mask"
"""What follows the name of a weight that is stored in two parts."""


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that are not zero, in order, and a mask of one bit each.

    Args:
        weight: any shape and floating dtype, on the CPU.

    Returns:
        `[kept]` in the dtype of `weight`, and `[ceil(numel / 8)]` uint8, first entry in the highest
        bit.
    """
    flat = weight.detach().contiguous().flatten()
    kept = flat.view(BITS[flat.element_size()]) != 0
    return flat[kept].clone(), torch.from_numpy(np.packbits(kept.numpy()))


def unpack(values: Tensor, mask: Tensor, shape: tuple[int, ...], name: str = "a weight") -> Tensor:
    """The dense weight that `pack` was given.

    Raises:
        CheckpointError: when the parts do not fit each other or the shape; before any allocation.
    """
    count = math.prod(shape)
    if mask.dtype != torch.uint8 or mask.ndim != 1 or mask.numel() != -(-count // 8):
        raise CheckpointError(
            f"{name}: its mask has shape {list(mask.shape)} and type {mask.dtype}; a weight of "
            f"shape {list(shape)} needs {-(-count // 8)} bytes."
        )
    bits = torch.from_numpy(np.unpackbits(mask.cpu().numpy(), count=count)).bool()
    if values.ndim != 1 or not values.is_floating_point() or values.numel() != int(bits.sum()):
        raise CheckpointError(
            f"{name}: its mask keeps {int(bits.sum())} entries, and {list(values.shape)} values of "
            f"type {values.dtype} are stored."
        )
    flat = torch.zeros(count, dtype=values.dtype, device=values.device)
    flat[bits.to(values.device)] = values
    return flat.view(shape)


class Unpack(ConversionOps):
    """Makes a dense weight of its two parts while transformers loads them."""

    hf_quantizer = True
    """transformers then leaves the types of both parts alone."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """One dense weight under its full name, in the dtype of the parameter."""
        full_layer_name: str = kwargs["full_layer_name"]
        model: nn.Module = kwargs["model"]
        parts = {}
        for pattern, tensors in input_dict.items():
            for end in (VALUES, MASK):
                if end in pattern:
                    parts[end] = tensors[0] if isinstance(tensors, list) else tensors
        if set(parts) != {VALUES, MASK}:
            raise CheckpointError(f"{full_layer_name} has only {', '.join(sorted(parts))}.")
        if parts[
            MASK
        ].is_floating_point():  # cast with all else, where a model is quantized on load
            parts[MASK] = parts[MASK].to(torch.uint8)
        parameter = model.get_parameter(full_layer_name)
        dense = unpack(parts[VALUES], parts[MASK], tuple(parameter.shape), full_layer_name)
        return {full_layer_name: [dense.to(parameter.dtype)]}


def _conversions(packed: str) -> list[WeightConverter]:
    """For the weight that has an empty tensor beside its parts, if there is one; for all others."""
    made = [WeightConverter([rf"\.{VALUES}$", rf"\.{MASK}$"], "", operations=[Unpack()])]
    if packed:
        name = re.escape(packed)
        sources = [rf"{name}\.{VALUES}$", rf"{name}\.{MASK}$", rf"{name}$"]
        made.insert(0, WeightConverter(sources, packed, operations=[Unpack()]))
    return made


def register_bitmask() -> None:
    """Make the loader read bitmask storage. Done once, when hf_prune is imported."""
    if _conversions not in CONVERSIONS:
        CONVERSIONS.append(_conversions)


def _smaller(weight: Tensor) -> bool:
    """Whether a weight is a matrix, or has more axes, and two parts take less room than one."""
    if weight.ndim <= 1 or not weight.is_floating_point():
        return False
    bits = weight.detach().contiguous().view(BITS[weight.element_size()])
    return int((bits == 0).sum()) * weight.element_size() > -(-weight.numel() // 8)


def _to_pack(model: PreTrainedModel, keys: Container[str]) -> dict[str, list[str]]:
    """The weights to store in two parts, each with the keys that it has in the files now.

    Packed experts have several: transformers saves them one by one.
    """
    found = {}
    for name, value in model.state_dict().items():
        if not _smaller(value):
            continue
        parts = [name]
        if name not in keys:
            parts = list(revert_weight_conversion(model, {name: value.to("meta")}))
        if name in keys or (value.ndim > 2 and all(part in keys for part in parts)):
            found[name] = parts
    return found


def _pack_file(
    path: Path, packed: Mapping[str, Tensor], gone: Container[str], empty: str
) -> tuple[dict[str, str], int, int]:
    """Rewrite one file; where tensors are now, by name, and bytes before and after.

    Args:
        path: of the file.
        packed: what is stored in two parts in this file.
        gone: keys of what is stored so, here or elsewhere.
        empty: the name of the one that has an empty tensor beside its parts.
    """
    tensors: dict[str, Tensor] = {}
    before = path.stat().st_size
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {"format": "pt"}
        for name in file.keys():  # noqa: SIM118  # no dict
            if name not in gone:
                tensors[name] = file.get_tensor(name)
    for name, weight in packed.items():
        tensors[f"{name}.{VALUES}"], tensors[f"{name}.{MASK}"] = pack(weight.cpu())
        if name == empty:
            tensors[name] = weight.new_empty(0, device="cpu")
    mode = path.stat().st_mode
    part = path.with_suffix(".part")
    save_file(tensors, part, notes)
    part.chmod(mode)
    part.replace(path)
    return dict.fromkeys(tensors, path.name), before, path.stat().st_size


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def pack_folder(folder: Path, model: PreTrainedModel) -> dict[str, int]:
    """Rewrite the weights of a saved model, and let its config name the loader.

    Packed experts, which transformers saves one by one, are stored under the model's own names.

    Args:
        folder: written by `save_pretrained`, not yet in its final place.
        model: the one that was saved. It is not changed.

    Returns:
        `bytes_dense` and `bytes_stored`: sizes of all weight files, before and after.
    """
    where: dict[str, str] = {}
    paths = sorted(folder.glob("*.safetensors"))
    place = {name: path for path in paths for name in _names_in(path)}
    state, keys = model.state_dict(), _to_pack(model, place)
    gone = {key for parts in keys.values() for key in parts}
    inside = f"{model.base_model_prefix}."  # of a task model, whose base may be loaded alone
    empty = next((name for name in keys if name.startswith(inside)), next(iter(keys), ""))
    sizes = {"bytes_dense": 0, "bytes_stored": 0}
    for path in paths:
        packed = {name: state[name] for name, parts in keys.items() if place[parts[0]] == path}
        found, before, after = _pack_file(path, packed, gone, empty)
        where |= found
        sizes["bytes_dense"] += before
        sizes["bytes_stored"] += after
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        data = json.loads(index.read_text(encoding="utf-8"))
        data["weight_map"] = dict(sorted(where.items()))
        index.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    config = folder / "config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    data["quantization_config"] = get_shapes(model)
    if empty:
        data["quantization_config"][PACKED] = empty.removeprefix(inside)
    config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sizes

"""Widths written down: what a pruned model's config must say so that it can be built again.

`hf_prune.surgery.rebuild` follows the description; here it is made.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import CheckpointError
from hf_prune.sites import base_model, find_sites, logical_weight
from hf_prune.surgery.description import KEY, QUANT_METHOD, SHAPES_VERSION, TABLES, Shapes
from hf_prune.surgery.rebuild import resolve, update_sizes_


@dataclass
class Changes:
    """What a removal has changed, by module path from the base model."""

    modules: set[str] = field(default_factory=set)
    """`Linear` and `Conv1D` layers that were resized. `/` begins a path outside the base model."""
    parameters: set[str] = field(default_factory=set)
    """Other parameters that were resized."""
    attributes: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """Sizes that modules keep about themselves."""
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attentions that slice a shared position bias."""
    empty: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attentions that have no heads left and need to be told."""
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attentions whose key/value heads are read by different numbers of query heads."""


def narrow_(module: nn.Module, axis: int, index: Tensor) -> None:
    """Keep some rows (`axis` 0, with the bias) or columns (`axis` 1) of a linear layer."""
    stored_axis = 1 - axis if isinstance(module, Conv1D) else axis
    narrow_parameter_(module, "weight", stored_axis, index)
    if axis == 0 and module.bias is not None:
        narrow_parameter_(module, "bias", 0, index)
    update_sizes_(module)


def narrow_parameter_(module: nn.Module, name: str, axis: int, index: Tensor) -> None:
    """Keep some positions of one axis of a parameter."""
    old: Tensor = getattr(module, name)
    kept = old.detach().index_select(axis, index.to(old.device)).contiguous()
    setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))


def get_shapes(model: PreTrainedModel) -> dict[str, Any]:
    """The description that the model's config carries; an empty one, if it was never pruned."""
    config = getattr(model.config, "quantization_config", None)
    data = config if isinstance(config, Mapping) else config.to_dict() if config is not None else {}
    if data and data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"the config has a quantization_config of {data.get('quant_method')!r}: prune first, "
            "then quantize."
        )
    tables = {
        table: {name: entry.copy() for name, entry in data.get(table, {}).items()}
        for table in TABLES
        if table in ("modules", "attributes") or table in data
    }
    return {"quant_method": QUANT_METHOD, "version": SHAPES_VERSION, **tables}


def is_pruned(model: PreTrainedModel) -> bool:
    """Whether the config describes other widths than it would build by itself."""
    return getattr(model.config, KEY, None) is not None


def forget_shapes_(config: PreTrainedConfig) -> None:
    """Take our description out of a config, with what it says of the widths of each layer."""
    for part in (config, config.get_text_config(decoder=True)):
        for key in (KEY, "_heterogeneity_spec", "allow_global_per_layer_attribute_access"):
            part.__dict__.pop(key, None)


def get_key(config: PreTrainedConfig, key: str) -> Any:
    """What a config says under a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def set_key_(config: PreTrainedConfig, key: str, value: int) -> None:
    """Say something under a dotted key of a config."""
    path, _, last = key.rpartition(".")
    setattr(get_key(config, path) if path else config, last, value)


def record_shapes_(model: PreTrainedModel, changes: Changes) -> None:
    """Write the present sizes of what has changed into the model's config.

    After this a plain `model.save_pretrained(...)` saves a model that can be loaded.
    """
    base = base_model(model)
    shapes = get_shapes(model)
    for name in sorted(changes.modules):
        root = model if name.startswith("/") else base
        out, inputs = logical_weight(resolve(root, name)).shape
        shapes["modules"][name] = {"out": int(out), "in": int(inputs)}
    for name, values in changes.attributes.items():
        shapes["attributes"].setdefault(name, {}).update(values)
    for name in sorted(changes.parameters):
        root = model if name.startswith("/") else base
        sizes = list(root.get_parameter(name.removeprefix("/")).shape)
        shapes.setdefault("parameters", {})[name] = sizes
    for name, entry in changes.heads.items():
        shapes.setdefault("heads", {})[name] = entry
    for name, entry in changes.empty.items():
        shapes.setdefault("empty", {})[name] = entry
        shapes.get("heads", {}).pop(name, None)
    for name, entry in changes.groups.items():
        shapes.setdefault("groups", {})[name] = entry
    for name in changes.empty:
        shapes.get("groups", {}).pop(name, None)
    model.config.quantization_config = Shapes(shapes)


def record_caches_(model: PreTrainedModel) -> None:
    """Write each layer's key/value heads into the config of a decoder, where caches look for them.

    transformers reads them when it builds a static cache before the first pass; to build the model
    it reads the sizes of the whole, which stay.
    """
    config = model.config.get_text_config(decoder=True)
    causal = any(getattr(module, "is_causal", False) for module in base_model(model).modules())
    if model.config.is_encoder_decoder or not causal or not hasattr(config, "per_layer_config"):
        return
    layers = {  # what attention without heads gives
        layer: {"num_key_value_heads": 1, "head_dim": 1}
        for layer in range(config.num_hidden_layers)
    }
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for site in find_sites(model, ["heads"]):
        if not site.cross:
            heads = site.reads[-1] + 1 if site.reads else site.units
            layers[site.layer] = {"num_key_value_heads": heads, "head_dim": width}
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = layers  # type: ignore[assignment]  # a dict is invariant


def keep_index(size: int, drop: "list[int]") -> Tensor:
    """The positions of an axis that stay, `[kept]`, when `drop` go."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[drop] = False
    return mask.nonzero().flatten()

"""What others left behind: checkpoints of older tools, written anew as checkpoints of ours.

Four layouts are read: folders of transformers 4 with `pruned_heads` in the config; weights whose
shapes are smaller than the config says (CoFi, hidden width too); masks of `torch.nn.utils.prune`;
and weights full of zero heads and zero neurons (nn_pruning). They may be mixed in one folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_prune.checkpoint.folder import check_output
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import CheckpointError
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import (
    Site,
    base_model,
    find_sites,
    has_module,
    logical_weight,
    projection,
)
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.shapes import Changes, record_shapes_

MAX_CONFIG_BYTES = 1 << 24
"""A config larger than this is refused before it is parsed."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
"""Text files beside a model that are taken along."""


@dataclass
class Conversion:
    """What was found, and what became of it."""

    model: PreTrainedModel
    found: list[str] = field(default_factory=list)
    """The old layouts, one line each."""


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a table.")
    return data


def _shards(folder: Path, index: Path) -> list[Path]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map.")
    for name in names.values():
        if Path(name).name != name or "\\" in name or (folder / name).is_symlink():
            raise CheckpointError(f"{index}: {name!r} is not the plain name of a file beside it.")
    return [folder / name for name in sorted(set(names.values()))]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors, or pickles that hold nothing but tensors.

    Raises:
        CheckpointError: when there are none, or a file is damaged or holds anything else.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{ending}.index.json", folder / f"{stem}.{ending}"
        if not index.is_file() and not single.is_file():
            continue
        state: dict[str, Tensor] = {}
        for path in _shards(folder, index) if index.is_file() else [single]:
            try:
                if ending == "safetensors":
                    part = load_file(path)
                else:
                    part = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  # old folders have nothing else; no code is run
            except Exception as error:  # every way in which a file can be damaged or hostile
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            if not isinstance(part, dict):
                raise CheckpointError(f"{path} does not hold a table of tensors.")
            state |= part
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{folder}: the weights hold something else than tensors.")
        return state
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin.")


def _class(config: Mapping[str, Any]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    names, kind = config.get("architectures") or [], config.get("model_type")
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise CheckpointError(f"architectures {names!r} of the config: no class of transformers.")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"model_type {kind!r} of the config is not known to transformers.")
    plain = {k: v for k, v in config.items() if k not in ("pruned_heads", "quantization_config")}
    return found, CONFIG_MAPPING[kind].from_dict(plain)


def fold_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the masks of `torch.nn.utils.prune`: `weight_orig * weight_mask`."""
    result = {}
    for name, value in state.items():
        if name.endswith("_orig"):
            plain = name.removesuffix("_orig")
            mask = state.get(f"{plain}_mask")
            if mask is None or mask.shape != value.shape:
                raise CheckpointError(f"{name} has no mask of its shape.")
            result[plain] = value * mask.to(value.dtype)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            result[name] = value
    return result


def _pruned_heads(config: Mapping[str, Any]) -> dict[int, list[int]]:
    value = config.get("pruned_heads") or {}
    if not isinstance(value, dict):
        raise CheckpointError("pruned_heads of the config is not a table of layers.")
    result = {}
    for layer, heads in value.items():
        good = str(layer).isdecimal() and isinstance(heads, list)
        if not good or not all(type(head) is int and head >= 0 for head in heads):
            raise CheckpointError(f"pruned_heads[{layer!r}] of the config is not a list of heads.")
        result[int(layer)] = sorted(set(heads))
    return result


def _sizes_that_differ(
    model: PreTrainedModel, state: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """By name, the sizes of parameters that are smaller than the model's.

    Raises:
        CheckpointError: when one is larger, or has another number of axes.
    """
    prefix = f"{model.base_model_prefix}."
    inside = base_model(model) is not model and not any(k.startswith(prefix) for k in state)
    result = {}
    for name, parameter in model.named_parameters():
        saved = state.get(name.removeprefix(prefix) if inside else name)
        if saved is None or saved.shape == parameter.shape:
            continue
        fits = saved.ndim == parameter.ndim
        if not fits or any(a > b for a, b in zip(saved.shape, parameter.shape, strict=True)):
            raise CheckpointError(
                f"{name} is saved as {list(saved.shape)}, and the config says "
                f"{list(parameter.shape)}: pruning makes matrices smaller."
            )
        result[name] = tuple(saved.shape)
    return result


def _describe(model: PreTrainedModel, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a model on `meta` the sizes that were saved, and write them into its config."""
    base, prefix = base_model(model), f"{model.base_model_prefix}."
    changes = Changes()
    for name, shape in sizes.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(last)
        setattr(module, last, nn.Parameter(old.new_empty(shape)))
        place = path.removeprefix(prefix) if base is not model and path.startswith(prefix) else path
        if base is not model and place == path:
            place = f"/{path}"
        if type(module) in (nn.Linear, Conv1D):
            changes.modules.add(place)
        else:
            changes.parameters.add(f"{place}.{last}")
    for site in find_sites(model):
        if site.shared_bias and any(
            f"{item.module}.weight" in _bare(sizes, prefix) for item in site.slices
        ):
            raise CheckpointError(
                f"{site.name}: which heads are left cannot be told from shapes, and they share a "
                "position bias."
            )
        for attribute in site.attributes:
            value = site.units * attribute.per_unit
            changes.attributes[attribute.module][attribute.name] = value
    record_shapes_(model, changes)


def _bare(sizes: Mapping[str, tuple[int, ...]], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in sizes}


def _is_zero(base: nn.Module, site: Site, position: int) -> Tensor:
    """For each unit `[U]`, whether all that it owns in one slice is zero, the bias included."""
    item = site.slices[position]
    module = projection(base, item.module)
    weight = logical_weight(module).detach()
    weight = weight if item.axis == 0 else weight.T  # [U * D, .]
    rows = weight[item.offset : item.offset + site.units * item.width]
    zero = (rows == 0).all(dim=1)
    if item.axis == 0 and isinstance(module.bias, Tensor):
        zero &= module.bias.detach()[item.offset : item.offset + len(rows)] == 0
    result: Tensor = zero.view(site.units, item.width).all(dim=1)
    return result


def zero_units(model: PreTrainedModel) -> Plan:
    """A plan that removes heads and neurons that contribute exactly nothing.

    A unit goes when all its columns of the output projection are zero; a head also when its values
    are; a neuron also when all that goes into it is, and the activation of 0 is 0.
    """
    base, sites = base_model(model), {}
    name = getattr(model.config, "hidden_act", None) or getattr(
        model.config, "activation_function", ""
    )
    quiet = name in ACT2FN and float(ACT2FN[name](torch.zeros(1))) == 0
    for site in find_sites(model):
        gone = _is_zero(base, site, len(site.slices) - 1)
        separate = len({(item.module, item.offset) for item in site.slices}) == len(site.slices)
        if site.kind == "heads" and len(site.slices) > 3 and separate:
            gone = gone | _is_zero(base, site, 2)
        if site.kind == "neurons" and quiet:
            into = [_is_zero(base, site, i) for i in range(len(site.slices) - 1)]
            gone = gone | torch.stack(into).all(dim=0)
        kept = tuple((~gone).nonzero().flatten().tolist())
        if len(kept) < site.units:
            sites[site.name] = SitePlan(site.kind, site.units, kept)
    return Plan(model.config.model_type, sites)


def _heads_plan(model: PreTrainedModel, heads: Mapping[int, list[int]]) -> Plan:
    sites = {}
    for site in find_sites(model, ["heads"]):
        lost = heads.get(site.layer, [])
        if lost and not site.cross:
            if lost[-1] >= site.units:
                raise CheckpointError(
                    f"pruned_heads names head {lost[-1]} of layer {site.layer}, which has "
                    f"{site.units}."
                )
            kept = tuple(sorted(set(range(site.units)) - set(lost)))
            sites[site.name] = SitePlan(site.kind, site.units, kept)
    return Plan(model.config.model_type, sites)


def _on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return cls(config)


def _check_blocks(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Refuse a folder in which whole blocks are missing, which others skip together with a norm."""
    base = base_model(model)
    for site in find_sites(model):
        name = f"{site.gate.module}.weight"
        if has_module(base, site.gate.module) and not any(key.endswith(name) for key in state):
            raise CheckpointError(
                f"the weights have no {name}: a model without this block runs its norm or does "
                "not, and shapes do not tell. Put zeros in its place."
            )


def read_old(folder: "str | Path") -> Conversion:
    """The model of an old folder, really smaller, and what was found in it.

    Raises:
        CheckpointError: when it cannot be read, or its parts contradict each other.
        UnsupportedModelError: when the family of the model is not known.
    """
    folder = Path(folder)
    data = _json(folder / "config.json")
    cls, config = _class(data)
    raw = read_weights(folder)
    state = fold_masks(raw)
    result = Conversion(_on_meta(cls, config))
    if len(state) < len(raw):
        count = len(raw) - len(state)
        result.found.append(f"{count} masks of torch.nn.utils.prune")
    model, heads = result.model, _pruned_heads(data)
    _check_blocks(model, state)
    sizes = _sizes_that_differ(model, state)
    if heads:
        total = sum(len(item) for item in heads.values())
        result.found.append(f"pruned_heads of transformers 4: {total} heads")
    if heads and sizes:
        remove_units(model, _heads_plan(model, heads))
        sizes = _sizes_that_differ(model, state)
        heads = {}
    elif sizes:
        result.found.append(f"{len(sizes)} parameters smaller than the config says")
    if sizes:
        _describe(model, sizes)
    loaded: Any = cls.from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True
    )
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(info["missing_keys"]) or sorted(info["mismatched_keys"])
        raise CheckpointError(f"{folder}: the weights do not fit: {wrong[:5]}")
    if heads:  # full size, as nn_pruning saves it
        remove_units(model, _heads_plan(model, heads))
    plan = zero_units(model)
    if plan.sites:
        count = sum(len(site.removed) for site in plan.sites.values())
        result.found.append(f"{count} heads and neurons of zeros")
        remove_units(model, plan)
    result.model = model.eval()
    return result


def convert(source: "str | Path", out: "str | Path", *, overwrite: bool = False) -> Conversion:
    """Read an old folder and write a checkpoint of ours, tokenizer files included.

    Raises:
        CheckpointError: when nothing was pruned in it, or as `read_old` does.
        OutputExistsError: when `out` exists and `overwrite` is off.
    """
    source, out = Path(source), Path(out)
    check_output(out, overwrite=overwrite)
    result = read_old(source)
    if not result.found:
        raise CheckpointError(f"{source}: nothing was pruned: there is nothing to convert.")
    extra = {
        name: (source / name).read_text(encoding="utf-8")
        for name in TOKENIZER_FILES
        if (source / name).is_file() and not (source / name).is_symlink()
    }
    save_model(result.model, out, overwrite=overwrite, extra=extra)
    return result

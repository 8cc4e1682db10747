"""What a saved model is: what was removed from it, and whether it is whole."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_prune.checkpoint.manifest import verify
from hf_prune.errors import CheckpointError, UnsupportedModelError
from hf_prune.measure.counts import count_nonzero, count_parameters
from hf_prune.sites import ALL_KINDS, find_sites
from hf_prune.statistics.score import check_weights
from hf_prune.surgery.description import QUANT_METHOD
from hf_prune.surgery.rebuild import apply_shapes_
from hf_prune.weights.find import find_weights


@dataclass(frozen=True)
class Kept:
    """What is left of one site."""

    site: str
    kind: str
    kept: int
    units: int


@dataclass(frozen=True)
class Inspection:
    """What was removed from a saved model. `sites` is empty where its family is not known.

    `nonzero` parameters are not zero, and `zeros` is the share of zeros of each matrix that has
    some; nothing where weights were not read.
    """

    architecture: str
    sites: tuple[Kept, ...]
    parameters: int
    dense_parameters: int
    nonzero: int | None = None
    zeros: dict[str, float] = field(default_factory=dict)


def _config(source: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the config of {source} cannot be read: {error}") from error
    return config


def _class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise CheckpointError(
            f"architectures {names!r} of the config name no class of transformers."
        )
    return found


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the dense sizes that a config states, without memory for its weights."""
    with torch.device("meta"):
        return _class(config)(config)


def inspect_model(source: "str | Path", *, zeros: bool = False) -> Inspection:
    """Say what was removed from a saved model, without reading its weights.

    Args:
        source: a folder, or the name of a repository on the Hub.
        zeros: read its weights all the same, and say how many of them are zero.

    Raises:
        CheckpointError: when the config or the weights cannot be read, or what the config says of
            widths is wrong.
    """
    found = _of_config(source)
    if not zeros:
        return found
    model = load_saved(source)
    shares = {
        name: 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        for name, weight in find_weights(model).items()
    }
    shares = {name: share for name, share in shares.items() if share}
    return replace(found, nonzero=count_nonzero(model), zeros=shares)


def _of_config(source: "str | Path") -> Inspection:
    config = _config(str(source))
    plain = copy.deepcopy(config)
    for key in ("quantization_config", "per_layer_config"):
        plain.__dict__.pop(key, None)
    dense, pruned = _built(plain), _built(plain)
    shapes = getattr(config, "quantization_config", None)
    if isinstance(shapes, dict) and shapes.get("quant_method") == QUANT_METHOD:
        apply_shapes_(pruned, shapes)
    try:
        left = {site.name: site.units for site in find_sites(pruned, ALL_KINDS)}
        sites = tuple(
            Kept(site.name, site.kind, left.get(site.name, 0), site.units)
            for site in find_sites(dense, ALL_KINDS)
        )
    except UnsupportedModelError:
        sites = ()
    name = type(dense).__name__
    return Inspection(name, sites, count_parameters(pruned), count_parameters(dense))


def load_saved(source: "str | Path") -> PreTrainedModel:
    """A saved model, of the class that its config names.

    Raises:
        CheckpointError: when config or weights cannot be read.
    """
    cls = _class(_config(str(source)))
    try:
        model: PreTrainedModel = cls.from_pretrained(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {error}") from error
    return model


def check_model(folder: "str | Path") -> list[str]:
    """Check a saved model in full: files, shapes, numbers, ties.

    Returns:
        What was checked, one line each.

    Raises:
        CheckpointError: for the first thing that is wrong.
        NumericsError: when a weight is not finite.
    """
    folder = Path(folder)
    done = [f"{len(verify(folder))} files have the sizes and SHA-256 of the manifest"]
    cls = _class(_config(str(folder)))
    try:
        loaded: Any = cls.from_pretrained(folder, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            raise CheckpointError(f"{folder}: {key.replace('_', ' ')}: {sorted(info[key])[:5]}")
    count = len(list(model.parameters()))
    done.append(f"{count} parameters have the shapes that the config states, none is missing")
    check_weights(model)
    total = count_parameters(model)
    done.append(f"{total} numbers are finite, {count_nonzero(model)} of them not zero")
    head = model.get_output_embeddings()
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
            raise CheckpointError(f"{folder}: input and output embeddings are tied no more.")
        done.append("input and output embeddings are one")
    return done

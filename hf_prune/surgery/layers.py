"""Layers of which nothing is left are taken out of their list.

Where a layer adds what it computes to what it was given, a layer without heads and neurons hands on
what it gets, plus the biases of its outputs. Those go into the layer before it, the list gets
shorter, and the config says so. Where it does more (a norm after the sum) it stays, and runs
without heads and neurons. Which of the two it is, is not taken from a description: the model is
compared with what it was, and with what its config builds.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.plan import rename_layers
from hf_prune.sites import (
    ALL_KINDS,
    Layer,
    base_model,
    find_layers,
    find_sites,
    projection,
)
from hf_prune.statistics.example import example_batch
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.description import TABLES, Shapes
from hf_prune.surgery.rebuild import apply_shapes_
from hf_prune.surgery.shapes import (
    forget_shapes_,
    get_key,
    get_shapes,
    is_pruned,
    record_caches_,
    set_key_,
)

logger = logging.getLogger(__name__)

TOLERANCE = 256.0
"""Difference that is taken for rounding, in units of the precision of the largest output."""
_NOT_COMPARED = ("training", "gradient_checkpointing")


def _empty_layers(model: PreTrainedModel) -> list[Layer]:
    """The layers without units, but for the first of a list that would have none left."""
    used = {site.layer_module for site in find_sites(model, ALL_KINDS)}
    layers = [layer for layer in find_layers(model) if layer.length]
    alive = {layer.list for layer in layers if layer.name in used}
    first = {layer.list: layer.name for layer in reversed(layers)}
    return [
        layer
        for layer in layers
        if layer.name not in used and (layer.list in alive or first[layer.list] != layer.name)
    ]


@torch.no_grad()
def _output(model: PreTrainedModel) -> Tensor:
    with in_eval(model):
        output: Tensor = model(**example_batch(model, 2, 12))[0]
    return output.double()


def _plain(module: nn.Module) -> dict[str, Any]:
    """What a module says of itself in plain values, and how many layers its config counts."""
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
        and not key.startswith("_")
        and key not in _NOT_COMPARED
    }
    return {**found, "layers": getattr(vars(module).get("config"), "num_hidden_layers", None)}


def _difference(model: PreTrainedModel) -> str:
    """Where a model differs from what its config builds; "" = nowhere."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    if is_pruned(model):
        apply_shapes_(built, get_shapes(model))
    ours: dict[str, nn.Module] = dict(model.named_modules())
    theirs: dict[str, nn.Module] = dict(built.named_modules())
    if list(ours) != list(theirs):
        return "its config would build other modules"
    for name, module in ours.items():
        other = theirs[name]
        # what ours says beyond that, such as of a kind of layer that went, does no harm
        if type(module) is not type(other) or not _plain(other).items() <= _plain(module).items():
            return f"its config would build {name} otherwise"
        shapes = [
            {key: None if p is None else p.shape for key, p in m._parameters.items()}
            for m in (module, other)
        ]
        if shapes[0] != shapes[1]:
            return f"its config would give {name} other parameters"
    return ""


def _drift(before: Tensor, after: Tensor, dtype: torch.dtype) -> str:
    """How far outputs have moved; "" = no further than rounding does."""
    off = float((after - before).abs().max())
    allowed = TOLERANCE * torch.finfo(dtype).eps * float(before.abs().max())
    return "" if off <= allowed else f"the output would differ by {off:.2g}"


class _Undo:
    """What was changed, and how to change it back."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def config(self, config: PreTrainedConfig) -> None:
        """Remember a config as it is."""
        before = copy.deepcopy(vars(config))

        def back() -> None:
            vars(config).clear()
            vars(config).update(before)

        self.steps.append(back)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute, and remember what it was."""
        before = getattr(module, name)
        self.steps.append(lambda: setattr(module, name, before))
        setattr(module, name, value)

    def run(self) -> None:
        """Change everything back."""
        for step in reversed(self.steps):
            step()


@torch.no_grad()
def _hand_back_biases(base: nn.Module, layer: Layer, before: Layer | None, undo: _Undo) -> bool:
    """Give the biases that are left of a layer to the one before it; whether that can be."""
    biases = [projection(base, name).bias for name in layer.outputs]
    found = [bias for bias in biases if bias is not None and bool(bias.any())]
    if not found:
        return True
    taker = projection(base, before.outputs[-1]) if before is not None else None
    if taker is None or taker.bias is None:
        return False
    total = taker.bias + sum(found)
    undo.attribute(taker, "bias", nn.Parameter(total, requires_grad=taker.bias.requires_grad))
    return True


def _cut_list(base: nn.Module, path: str, stay: Iterable[int], undo: _Undo) -> None:
    """Make a list of layers shorter, and let each layer know its new number."""
    parent, _, name = path.rpartition(".")
    owner = base.get_submodule(parent)
    old = getattr(owner, name)
    undo.attribute(owner, name, nn.ModuleList(old[index] for index in stay))
    for number, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            if vars(module).get("layer_idx") is not None:
                undo.attribute(module, "layer_idx", number)


def _cut_config(
    model: PreTrainedModel, owner: nn.Module, length: str, stay: list[int], size: int
) -> None:
    """Let the config, and that of the stack where it has one of its own, say what is left."""
    path, _, last = length.rpartition(".")
    own = getattr(owner, "config", None)
    holder = get_key(model.config, path) if path else model.config
    set_key_(holder, last, len(stay))
    for config in {id(c): c for c in (holder, own) if isinstance(c, PreTrainedConfig)}.values():
        if config is not holder:
            config.num_hidden_layers = len(stay)
        for key, value in list(vars(config).items()):
            if key == "mlp_only_layers":
                setattr(config, key, [stay.index(index) for index in value if index in stay])
            elif "layer" in key and isinstance(value, list) and len(value) == size:
                setattr(config, key, [value[index] for index in stay])


def _rename_shapes(model: PreTrainedModel, layers: Mapping[str, str], gone: set[str]) -> None:
    """Say under the new names what the config says of modules; nothing, where it was that only."""
    if not is_pruned(model):
        return
    shapes = get_shapes(model)
    for table in TABLES:
        if table in shapes:
            shapes[table] = {
                rename_layers(name, layers): entry
                for name, entry in shapes[table].items()
                if not any(name.startswith(f"{layer}.") for layer in gone)
            }
    cached = "per_layer_config" in vars(model.config.get_text_config(decoder=True))
    forget_shapes_(model.config)
    if any(shapes.get(table) for table in TABLES):
        model.config.quantization_config = Shapes(shapes)
        if cached:
            record_caches_(model)


def _take_out(model: PreTrainedModel, chosen: list[Layer], undo: _Undo) -> dict[str, str] | None:
    """Take layers out; their new names by their old ones, or None where biases have no place."""
    base, gone, names = base_model(model), {layer.name for layer in chosen}, {}
    for config in {id(c): c for c in _configs(model)}.values():
        undo.config(config)
    stay: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    before: dict[str, Layer] = {}
    for layer in find_layers(model):
        index = sizes.get(layer.list, 0)
        sizes[layer.list] = index + 1
        if layer.name in gone:
            if not _hand_back_biases(base, layer, before.get(layer.list), undo):
                return None
            continue
        kept = stay.setdefault(layer.list, [])
        names[layer.name] = f"{layer.list}.{len(kept)}"
        kept.append(index)
        before[layer.list] = layer
    for path, length in {layer.list: layer.length for layer in chosen}.items():
        _cut_list(base, path, stay[path], undo)
        owner = base.get_submodule(path.rpartition(".")[0])
        _cut_config(model, owner, length, stay[path], sizes[path])
    _rename_shapes(model, names, gone)
    return names


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    text = model.config.get_text_config(decoder=True)
    own = (vars(module).get("config") for module in model.modules())
    parts = [getattr(model.config, key, None) for key in model.config.sub_configs]
    every = (model.config, text, *parts, *own)
    return [config for config in every if isinstance(config, PreTrainedConfig)]


def _try(model: PreTrainedModel, chosen: list[Layer]) -> dict[str, str] | None:
    """Take layers out, if the model then is what it was, and what its config builds."""
    undo, before = _Undo(), _output(model)
    names = _take_out(model, chosen, undo)
    if names is None:
        reason = "its biases have no place in the layer before it"
    else:
        reason = _difference(model) or _drift(before, _output(model), model.dtype)
    if names is not None and not reason:
        return names
    undo.run()
    logger.info("%s stays without heads and neurons: %s", chosen[0].name, reason)
    return None


def shorten_layers_(model: PreTrainedModel) -> dict[str, str]:
    """Take out the layers that have no heads and no neurons left, where outputs stay the same.

    Args:
        model: after `remove_units`; changed in place. Its outputs stay the same up to rounding, its
            config says the new number of layers, and nothing else, if nothing else was pruned.

    Returns:
        By the path of each layer that is left, from the base model, the path that it had before.
        Empty where no layer went.

    Raises:
        UnsupportedModelError: for an unknown family or a wrapper.
    """
    empty = _empty_layers(model)
    if not empty:
        return {}
    found = _try(model, empty)
    if found is None:  # the first layer of a list may be needed: T5's computes a bias for all
        rest = [layer for layer in empty if not layer.name.endswith(".0")]
        found = _try(model, rest) if rest and rest != empty else None
    return {now: before for before, now in (found or {}).items()}


def moved_parameters(
    model: PreTrainedModel, named: Mapping[str, Tensor], layers: Mapping[str, str]
) -> dict[str, Tensor]:
    """What was known by the names of parameters, by the names that they have now.

    Args:
        model: after `shorten_layers_`.
        named: by parameter name of the model before. What is of a layer that has left is left out.
        layers: what `shorten_layers_` gave.
    """
    if not layers:
        return dict(named)
    base = base_model(model)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    now = {before: name for name, before in layers.items()}
    lists = {before.rpartition(".")[0] for before in now}
    moved = {}
    for name, value in named.items():
        inner = name.removeprefix(prefix)
        place = next((path for path in lists if inner.startswith(f"{path}.")), None)
        if place is not None:
            number = inner.removeprefix(f"{place}.").partition(".")[0]
            if f"{place}.{number}" not in now:
                continue
        moved[prefix * name.startswith(prefix) + rename_layers(inner, now)] = value
    return moved

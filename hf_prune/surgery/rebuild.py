"""Building a model again from what its config says: narrowed modules, heads that kept their bias.

The description is keyed by module path from the base model, with absolute sizes. It needs no
knowledge of the family, and it is checked against the model in full before any of it is acted on.

This module is also saved beside models that are to load without hf_prune. So it imports nothing of
ours but an error.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import CheckpointError

QUANT_METHOD = "hf_prune"
"""The name under which transformers finds our loader."""
SHAPES_VERSION = 1
"""Version of the description."""
MAX_ENTRIES = 1 << 20
"""More modules, and more heads, than any model has."""
TABLES = ("modules", "attributes", "parameters", "heads", "empty", "groups")
"""The tables that a description may have."""
KEY = "quantization_config"
"""The key of the config under which the description stands."""


class ConfigView:
    """A config of which one module sees some values differently; all else is the config's own."""

    def __init__(self, config: Any, values: dict[str, int]) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_values"):  # while being copied
            raise AttributeError(name)
        values = self._values
        return values[name] if name in values else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._config, name)


def get_attribute(module: nn.Module, name: str) -> Any:
    """What a module keeps about itself under a name; `config.x` is `x` of its config."""
    head, dot, key = name.partition(".")
    if not dot:
        return vars(module).get(name)
    config = vars(module).get("config")
    if head != "config" or not isinstance(config, (PreTrainedConfig, ConfigView)):
        return None
    return getattr(config, key, None)


def set_attribute_(module: nn.Module, name: str, value: int) -> None:
    """Set what `get_attribute` gets. A key of the config is set in a view of the module's own."""
    _, dot, key = name.partition(".")
    if not dot:
        setattr(module, name, value)
    else:
        config: Any = module.config
        if not isinstance(config, ConfigView):
            config = ConfigView(config, {})
            module.config = config
        config._values[key] = value


class MPNetKeptHeads(nn.Module):
    """Attention that takes its share of a position bias computed for all heads."""

    kept_heads: list[int]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the class does that is swapped for this one."""
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]  # [B, H, T, T] -> [B, kept, T, T]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


def _seen(cache: Any, layer: Any) -> Any:
    """How many tokens a cache has seen, as of now: a static one counts in place."""
    past = 0 if cache is None else cache.get_seq_length(layer)
    return past.clone() if isinstance(past, Tensor) else past


class T5KeptHeads(nn.Module):
    """Attention that takes its share of a shared position bias, and passes all of it on.

    In cross-attention the bias is zero and each layer makes its own. Each passes on one head of it,
    which fits any layer that was not narrowed.
    """

    kept_heads: list[int]

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """The bias of the heads that are left, `[1, kept, T, T]`."""
        bias: Tensor = super().compute_bias(*args, **kwargs)  # type: ignore[misc]  # of T5Attention
        return bias[:, self.kept_heads]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the class does that is swapped for this one."""
        past = _seen(past_key_values, self.layer_idx)
        cross = key_value_states is not None
        given = None if cross else position_bias
        narrow = None if given is None else given[:, self.kept_heads]
        output, bias, weights = super().forward(
            hidden_states, mask, key_value_states, narrow, past_key_values, **kwargs
        )
        if cross:
            bias = bias[:, :1]  # [1, kept, T, S] of zeros -> [1, 1, T, S]
        elif given is not None:
            bias = given
        else:
            sizes = hidden_states.shape[1], bias.shape[-1]
            bias = super().compute_bias(*sizes, device=bias.device, past_seen_tokens=past)  # type: ignore[misc]  # of T5Attention
        return output, bias, weights


class _Spread:
    """A cache, or none, that gives each query head its own keys and values."""

    def __init__(self, cache: Any, reads: list[int]) -> None:
        self.cache, self.reads = cache, reads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("cache", "reads"):  # while being copied
            raise AttributeError(name)
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the cache gives, `[B, K, T, D]`, as `[B, H, T, D]`."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return keys[:, self.reads], values[:, self.reads]


class UnevenGroups(nn.Module):
    """Attention in which key/value heads are read by different numbers of query heads."""

    reads: list[int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class does that is swapped for this one."""
        cache = kwargs.pop("past_key_values", None)
        return super().forward(*args, past_key_values=_Spread(cache, self.reads), **kwargs)


class NoHeads(nn.Module):
    """Attention without heads: what is left of it is the bias of its output.

    A decoder reads the length of the past from the cache of its first layer, so that one gets
    something of the right length all the same.
    """

    layer_idx: int
    out_name: str
    cross: bool

    def _lengthen(self, hidden_states: Tensor, cache: Any, source: Tensor | None) -> int:
        """Give the cache its entries; the number of positions that it has now."""
        states = hidden_states if source is None else source
        if cache is None or (self.cross and not isinstance(cache, EncoderDecoderCache)):
            return states.shape[1]
        if isinstance(cache, EncoderDecoderCache):
            if self.cross and (source is None or cache.is_updated.get(self.layer_idx)):
                return states.shape[1]
            if self.cross:
                cache.is_updated[self.layer_idx] = True
            cache = cache.cross_attention_cache if self.cross else cache.self_attention_cache
        nothing = states.new_zeros(*states.shape[:2], 1).unsqueeze(1)  # [B, 1, T, 1]
        keys, _ = cache.update(nothing, nothing, self.layer_idx)
        return int(keys.shape[-2])

    def _output(self, hidden_states: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        bias = getattr(self, self.out_name).bias
        return output if bias is None else output + bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output and, in the place of weights, nothing."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        given = (*args, *kwargs.values())
        cache = next((value for value in given if isinstance(value, Cache)), None)
        names = ("key_value_states", "encoder_hidden_states")
        source = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        if self.cross and source is None and len(args) > 1:
            source = args[1]
        self._lengthen(hidden_states, cache, source)
        return self._output(hidden_states), None


class NoContext(NoHeads):
    """The inner part of an attention without heads, whose output projection is outside of it."""

    def _output(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., :0]  # [B, T, E] -> [B, T, 0]


class T5NoHeads(NoHeads, T5KeptHeads):
    """T5's attention without heads: in the first layer it still computes the bias of all."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As T5KeptHeads does."""
        past = _seen(past_key_values, self.layer_idx)
        length = self._lengthen(hidden_states, past_key_values, key_value_states)
        tokens = hidden_states.shape[1]
        if key_value_states is not None:
            position_bias = hidden_states.new_zeros(1, 1, tokens, key_value_states.shape[1])
        elif position_bias is None:
            position_bias = super(T5KeptHeads, self).compute_bias(  # type: ignore[misc]  # of T5Attention
                tokens, length, device=hidden_states.device, past_seen_tokens=past
            )
        return self._output(hidden_states), position_bias, None


NO_HEADS: dict[str, type[NoHeads]] = {"block": NoHeads, "context": NoContext, "t5": T5NoHeads}
"""By kind: what attention becomes when it has no heads left."""


class NoInputs(Conv1D):
    """A `Conv1D` whose inputs are all gone, which PyTorch cannot run: its bias is left."""

    def forward(self, x: Tensor) -> Tensor:
        """The bias, for each token."""
        return x.new_zeros(*x.shape[:-1], self.nf) + self.bias


KEPT_HEADS: dict[str, tuple[type[nn.Module], str]] = {
    "t5": (T5KeptHeads, "n_heads"),
    "mpnet": (MPNetKeptHeads, "num_attention_heads"),
}
"""By the way that a position bias takes: what attention becomes, and its count of heads."""


_JOINED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _joined(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """The one class that is both; made once, so that equal models have equal classes."""
    if (mixin, cls) not in _JOINED:
        _JOINED[mixin, cls] = type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
    return _JOINED[mixin, cls]


def keep_heads_(module: nn.Module, bias: str, kept: list[int]) -> None:
    """Make a narrowed attention slice the position bias that all layers share.

    Args:
        module: the attention.
        bias: a key of `KEPT_HEADS`.
        kept: the heads that are left, in the numbering of the dense model.
    """
    mixin, _ = KEPT_HEADS[bias]
    if not isinstance(module, mixin):
        module.__class__ = _joined(mixin, type(module))
    module.kept_heads = kept  # type: ignore[assignment]  # nn.Module types what it holds as modules


def spread_(module: nn.Module, reads: list[int]) -> None:
    """Let each query head of a narrowed attention read the key/value head that is its own.

    Args:
        module: the attention.
        reads: for each query head that is left, the number of that key/value head.
    """
    if not isinstance(module, UnevenGroups):
        module.__class__ = _joined(UnevenGroups, type(module))
    module.reads = reads  # type: ignore[assignment]  # nn.Module types what it holds as modules


def empty_(module: nn.Module, kind: str, out: str, *, cross: bool) -> None:
    """Make an attention that has no heads left run without them.

    Args:
        module: the attention.
        kind: a key of `NO_HEADS`.
        out: name of its output projection, where that is inside of it.
        cross: whether it looks at another sequence.
    """
    module.__class__ = _joined(NO_HEADS[kind], type(module))
    module.out_name, module.cross = out, cross  # type: ignore[assignment]  # as above


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_selection(value: object) -> bool:
    """Whether it is a list of sorted indices, each of them once."""
    if not isinstance(value, list) or len(value) > MAX_ENTRIES or not all(map(_is_size, value)):
        return False
    return min(value, default=0) >= 0 and all(a < b for a, b in pairwise(value))


def _table(shapes: Mapping[str, Any], key: str, kind: type) -> dict[str, Any]:
    """One table of a description, with entries of one kind."""
    value = shapes.get(key, {})
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise CheckpointError(f"{KEY}.{key} is not a table of modules.")
    for name, entry in value.items():
        if not isinstance(name, str) or not isinstance(entry, kind):
            what = "table" if kind is dict else "list"
            raise CheckpointError(f"{KEY}.{key}[{name!r}] is not a {what}.")
    return value


def _check_sizes(where: str, entry: Mapping[Any, Any]) -> None:
    for name, size in entry.items():
        if not isinstance(name, str) or not _is_size(size):
            raise CheckpointError(f"{where}.{name} = {size!r} is not an integer.")
        if size < 0:
            raise CheckpointError(f"{where}.{name} = {size} is negative.")


def _check_heads(where: str, entry: Mapping[Any, Any]) -> None:
    bias, kept = entry.get("bias"), entry.get("kept")
    if set(entry) != {"bias", "kept"} or not isinstance(bias, str) or bias not in KEPT_HEADS:
        raise CheckpointError(f"{where} must have 'kept' and a 'bias' of {sorted(KEPT_HEADS)}.")
    if not _is_selection(kept):
        raise CheckpointError(f"{where}.kept is not a sorted list of heads, each of them once.")


def _check_empty(where: str, entry: Mapping[Any, Any]) -> None:
    kind, out, cross = entry.get("kind"), entry.get("out"), entry.get("cross")
    good = set(entry) == {"kind", "out", "cross"} and isinstance(kind, str) and kind in NO_HEADS
    if not good or not isinstance(out, str) or not isinstance(cross, bool):
        raise CheckpointError(
            f"{where} must have a 'kind' of {sorted(NO_HEADS)}, 'out' and 'cross'."
        )


def _check_groups(where: str, entry: Mapping[Any, Any]) -> None:
    reads = entry.get("reads")
    good = set(entry) == {"reads"} and isinstance(reads, list) and 0 < len(reads) <= MAX_ENTRIES
    good = good and all(map(_is_size, reads)) and reads[0] == 0  # type: ignore[arg-type,index]  # a list
    if not good or not all(b - a in (0, 1) for a, b in pairwise(reads)):  # type: ignore[arg-type]  # as above
        raise CheckpointError(
            f"{where}.reads must give each query head the key/value head that it reads, in order, "
            "from 0 on and with none left out."
        )


def check_shapes(shapes: Mapping[str, Any]) -> None:
    """Check a description by itself: version, tables, kinds of value, signs.

    Raises:
        CheckpointError: naming the key.
    """
    version = shapes.get("version")
    if type(version) is not int or version != SHAPES_VERSION:
        raise CheckpointError(
            f"{KEY}.version is {shapes.get('version')!r}; this hf_prune reads "
            f"version {SHAPES_VERSION}. A newer checkpoint needs a newer hf_prune."
        )
    for name, entry in _table(shapes, "modules", dict).items():
        _check_sizes(f"{KEY}.modules[{name!r}]", entry)
        if set(entry) != {"out", "in"}:
            raise CheckpointError(f"{KEY}.modules[{name!r}] must have 'out' and 'in'.")
    for name, entry in _table(shapes, "attributes", dict).items():
        _check_sizes(f"{KEY}.attributes[{name!r}]", entry)
    for name, sizes in _table(shapes, "parameters", list).items():
        _check_sizes(f"{KEY}.parameters[{name!r}]", {str(i): s for i, s in enumerate(sizes)})
    for name, entry in _table(shapes, "heads", dict).items():
        _check_heads(f"{KEY}.heads[{name!r}]", entry)
    for name, entry in _table(shapes, "empty", dict).items():
        _check_empty(f"{KEY}.empty[{name!r}]", entry)
    for name, entry in _table(shapes, "groups", dict).items():
        _check_groups(f"{KEY}.groups[{name!r}]", entry)


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
    if not _is_size(current) or attribute.startswith("_") or "._" in attribute:
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
    if not _is_size(groups) or not _is_size(total) or isinstance(module, (UnevenGroups, NoHeads)):
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

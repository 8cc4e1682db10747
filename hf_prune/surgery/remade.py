"""What modules become where narrower matrices do not say it all: attention without heads, say.

This module is also saved beside models that are to load without hf_prune. So it imports nothing of
ours.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig
from transformers.pytorch_utils import Conv1D


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

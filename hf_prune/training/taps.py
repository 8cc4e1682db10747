"""Taps: what a model computes inside, read by hooks while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.sites import Site, base_model, find_sites, get_module, layer_modules

ATTENTION_PARTS = ("queries", "keys", "values")
"""What a tap reads of an attention block, in the order of its slices."""
_MOVED_POSITIONS = ("rotary", "relative", "rel_pos", "pos_key_proj", "pos_query_proj")


@dataclass
class Taps:
    """What the last forward pass computed, and the hooks that read it.

    Attributes:
        hidden: `[B, T, E]` each: the input of the first layer, then the output of every layer.
        parts: by layer and name (`ATTENTION_PARTS`): `[B, T, W]`, all heads side by side.
        head_widths: by layer, the width of one query head.
        training_only: whether hooks record in training mode only.
    """

    layers: int
    causal: bool
    hidden: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    head_widths: dict[int, int] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    training_only: bool = False

    def heads(self, layer: int, part: str) -> Tensor:
        """A part of a layer by heads, `[B, H, T, D]`."""
        whole = self.parts[layer, part]  # [B, T, H * D]
        width = self.head_widths[layer]
        return whole.view(*whole.shape[:2], -1, width).transpose(1, 2)

    def listens(self, module: nn.Module) -> bool:
        """Whether what this module computes now is recorded."""
        return module.training or not self.training_only

    def clear(self) -> None:
        """Forget what was recorded, so that its memory can go."""
        self.hidden.clear()
        self.parts.clear()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.clear()


def is_causal(model: PreTrainedModel) -> bool:
    """Whether tokens see only what is before them, as the attention modules say."""
    layers = layer_modules(model)
    return any(bool(getattr(m, "is_causal", False)) for m in layers[0].modules())


def check_plain_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention maps are more than the product of queries and keys.

    Raises:
        ConfigError: with what to do instead.
    """
    for name, _ in base_model(model).named_modules():
        if any(part in name for part in _MOVED_POSITIONS):
            raise ConfigError(
                f"attention maps of {model.config.model_type!r} also depend on positions "
                f"({name}): use relations (of values, queries and keys) instead of attention."
            )


def _first(value: Any) -> Tensor:
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, Tensor)  # noqa: S101  # what every layer of transformers takes and gives
    return found


def _tap_hidden(model: PreTrainedModel, taps: Taps) -> None:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if taps.listens(module):
            taps.hidden[0] = _first(args if args else kwargs["hidden_states"])

    layers = layer_modules(model)
    taps.handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
    for index, layer in enumerate(layers):

        def after(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
            if taps.listens(module):
                taps.hidden[index + 1] = _first(output)

        taps.handles.append(layer.register_forward_hook(after))


def _check_apart(site: Site) -> None:
    """Refuse an attention block whose queries, keys and values do not lie apart.

    Raises:
        ConfigError: naming the block.
    """
    parts = site.slices[:3]
    places = {(item.module, item.offset) for item in parts if item.axis == 0 and not item.parameter}
    if len(places) < len(ATTENTION_PARTS):
        raise ConfigError(
            f"{site.name} packs queries, keys and values head by head: attention and relations "
            "cannot be taught, hidden states and logits can."
        )


def _tap_attention(model: PreTrainedModel, sites: Sequence[Site], taps: Taps) -> None:
    base = base_model(model)
    for site in sites:
        _check_apart(site)
        taps.head_widths[site.layer] = site.slices[1].width  # of a key; a query unit may hold many
        for name, item in zip(ATTENTION_PARTS, site.slices[:3], strict=True):
            end = item.offset + site.units * item.width

            def after(
                module: nn.Module,
                args: Any,
                output: Tensor,
                key: tuple[int, str] = (site.layer, name),
                columns: slice = slice(item.offset, end),
            ) -> None:
                if taps.listens(module):
                    taps.parts[key] = output[..., columns]  # [B, T, U * width]

            taps.handles.append(get_module(base, item.module).register_forward_hook(after))


def attach_taps(
    model: PreTrainedModel, *, hidden: bool, attention: bool, training_only: bool = False
) -> Taps:
    """Read hidden states, or queries, keys and values, of every forward pass from now on.

    Raises:
        ConfigError: under gradient checkpointing, which runs the layers without their graph, and
            for models with encoder and decoder, whose layers see other tokens.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError("models with encoder and decoder are taught by their logits only.")
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ConfigError(
            "gradient checkpointing hides the layers from distillation: turn it off, or distill "
            "logits only."
        )
    taps = Taps(len(layer_modules(model)), is_causal(model), training_only=training_only)
    if hidden:
        _tap_hidden(model, taps)
    if attention:
        _tap_attention(model, find_sites(model, ("heads",)), taps)
    return taps


def real_tokens(kwargs: dict[str, Any], like: Tensor) -> Tensor:
    """True for real tokens, `[B, T]`: by the attention mask, or all of those in `[B, T, E]`."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == like.shape[:2]:
        return mask.bool()
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)

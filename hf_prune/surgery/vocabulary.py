"""Vocabulary entries removed from a model together with its tokenizer.

An entry is a row of the embedding, of the output head, and a number of its bias. Where a model has
an axis of the vocabulary is not taken from names: it is built twice on `meta`, with the old and the
new size in its config, and what differs between the two is what has to change. So the config says
the result by itself, and it loads with no loader of ours, unless the model was pruned before.

Tokens keep their order, and with it the largest number its place.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.errors import ConfigError, DataError, UnsupportedModelError
from hf_prune.sites import base_model
from hf_prune.surgery.rebuild import update_sizes_
from hf_prune.surgery.shapes import Changes, get_shapes, record_shapes_
from hf_prune.surgery.tokenizer import describe, narrow_tokenizer, needed, tokens_of, with_ways

_BATCH = 256
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Keys of a config that list tokens which may be gone."""
_NOT_OF_TOKENS = ("quantization_config", "per_layer_config", "_heterogeneity_spec")


@dataclass(frozen=True)
class Vocabulary:
    """What is left of a vocabulary."""

    tokenizer: PreTrainedTokenizerBase
    """The new one."""
    kept: tuple[int, ...]
    """Old numbers of the tokens that are left, in their order: the new number is the place."""
    before: int
    """Rows that the embedding had."""


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs in some texts, special ones around them too. Texts are streamed.

    Raises:
        DataError: when there are none.
    """
    counts: Counter[int] = Counter()
    left = iter(texts)
    while batch := list(islice(left, _BATCH)):
        for ids in tokenizer(batch, truncation=False, verbose=False)["input_ids"]:
            counts.update(ids)
    if not counts:
        raise DataError("there is no text: which tokens occur cannot be counted.")
    return counts


def choose_tokens(
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[int, int],
    *,
    at_least: int = 1,
    at_most: int | None = None,
) -> tuple[int, ...]:
    """The tokens that occur often enough, and those that the tokenizer cannot do without.

    Args:
        tokenizer: a fast one.
        counts: by token, how often it occurs.
        at_least: a token that occurs as often stays.
        at_most: of these, only so many stay, the most frequent; of equal ones those with the lower
            number. What the tokenizer needs comes on top: added and special tokens, characters or
            bytes, and in a BPE the parts from which tokens are joined.

    Returns:
        Their numbers, sorted.

    Raises:
        ConfigError: when a limit is not positive.
        UnsupportedModelError: for a tokenizer that is not one of the `tokenizers` library.
    """
    if at_least < 1 or (at_most is not None and at_most < 1):
        raise ConfigError(f"at_least={at_least} and at_most={at_most} must be positive counts.")
    data = describe(tokenizer)
    known = set(tokens_of(data).values())
    often = [t for t, count in counts.items() if count >= at_least and t in known]
    often.sort(key=lambda token: (-counts[token], token))
    return tuple(sorted(with_ways(data, needed(data) | set(often[:at_most]))))


def _configs(config: Any) -> Iterator[Any]:
    """A config, and those within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _generation(model: PreTrainedModel) -> list[Any]:
    """The settings of a model that generates."""
    found = getattr(model, "generation_config", None)
    return [] if found is None else [found]


def _names_tokens(key: str, value: Any) -> bool:
    return key.endswith(("_token_id", "_token_ids", "_token_index")) and value is not None


def _tokens(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if type(v) is int and v >= 0]


def _fixed(model: PreTrainedModel) -> set[int]:
    """The tokens that the config names, and those whose number has a meaning beside their name."""
    found: set[int] = set()
    for config in (*_configs(model.config), *_generation(model)):
        for key, value in vars(config).items():
            if _names_tokens(key, value):
                found |= set(_tokens(value))
            elif key.endswith("_to_id") and isinstance(value, dict):
                found |= set(value.values())
    rows = {name.rpartition(".")[0] for name in _axes(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        padding = vars(module).get("padding_idx")  # positions that are counted from its number
        counts = isinstance(module, nn.Embedding) or "Position" in type(module).__name__
        if counts and name not in rows and type(padding) is int:
            found |= set(range(padding + 1))
    return found


def _size(model: PreTrainedModel) -> int:
    """Entries of the vocabulary, as the config says.

    Raises:
        UnsupportedModelError: when it says none, or several.
    """
    sizes = {v for c in _configs(model.config) if (v := vars(c).get("vocab_size")) is not None}
    if len(sizes) != 1:
        raise UnsupportedModelError(
            f"the config of {type(model).__name__} has {len(sizes)} vocabularies: entries can be "
            "removed from models with one."
        )
    return int(sizes.pop())


def _renumber_(config: Any, new: Mapping[int, int]) -> None:
    """Let a config name tokens by their new numbers."""
    for key, value in list(vars(config).items()):
        if _names_tokens(key, value):
            mapped = [new.get(v, v) if type(v) is int else v for v in _as_list(value)]
            setattr(config, key, mapped if isinstance(value, list | tuple) else mapped[0])
        elif key in _LISTS and value is not None:
            setattr(config, key, [new[token] for token in value if token in new])
        elif key == "bad_words_ids" and value is not None:
            words = [word for word in value if all(token in new for token in word)]
            setattr(config, key, [[new[token] for token in word] for word in words] or None)
        elif key == "forced_decoder_ids" and value is not None:
            setattr(config, key, [[place, new.get(token, token)] for place, token in value])
        elif key.endswith("_to_id") and isinstance(value, dict):
            setattr(config, key, {name: new.get(token, token) for name, token in value.items()})


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _renumber_all_(config: PreTrainedConfig, new: Mapping[int, int]) -> None:
    for part in _configs(config):
        _renumber_(part, new)
        if vars(part).get("vocab_size") is not None:
            part.vocab_size = len(new)


def _built(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of the full widths that a config states, on `meta`."""
    for part in _configs(config):
        for key in _NOT_OF_TOKENS:
            part.__dict__.pop(key, None)
    with torch.device("meta"):
        return type(model)(config)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _axes(model: PreTrainedModel) -> dict[str, int]:
    """By name of a parameter or buffer, which of its axes is that of the vocabulary.

    Raises:
        UnsupportedModelError: when the model has none.
    """
    size, config = _size(model), copy.deepcopy(model.config)
    before = _tensors(_built(model, copy.deepcopy(config)))
    for part in _configs(config):
        if vars(part).get("vocab_size") is not None:
            part.vocab_size = size + 1
    found = {}
    for name, tensor in _tensors(_built(model, config)).items():
        old = before[name].shape
        for axis, entries in enumerate(tensor.shape):
            if (old[axis], entries) == (size, size + 1):
                found[name] = axis
            elif old[axis] != entries:
                raise UnsupportedModelError(
                    f"{name} has {old[axis]} entries, and not the {size} of the vocabulary."
                )
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no weight of its vocabulary.")
    return found


def _narrow_tensors_(model: PreTrainedModel, axes: Mapping[str, int], kept: Tensor) -> None:
    """Keep some positions of one axis of each tensor; what was one stays one."""
    done: dict[int, Tensor] = {}
    for name, axis in axes.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, last)
        if id(old) not in done:
            narrow = old.detach().index_select(axis, kept.to(old.device)).contiguous()
            if isinstance(old, nn.Parameter):
                narrow = nn.Parameter(narrow, requires_grad=old.requires_grad)
            done[id(old)] = narrow
            done[id(narrow)] = narrow  # met again under another name
        table = module._parameters if last in module._parameters else module._buffers
        table[last] = done[id(old)]  # type: ignore[assignment]  # a parameter where one was
        update_sizes_(module)


def _follow_(model: PreTrainedModel, old: PreTrainedModel, new: PreTrainedModel) -> None:
    """Set the integers that modules keep about themselves where two builds differ in them."""
    before = {name: vars(module) for name, module in old.named_modules(remove_duplicate=False)}
    after = {name: vars(module) for name, module in new.named_modules(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in after.get(name, {}).items():
            if type(value) is int and before[name].get(key) != value and key in vars(module):
                setattr(module, key, value)


def keep_tokens(model: PreTrainedModel, kept: Collection[int]) -> None:
    """Really remove, in place, the vocabulary entries that are not kept.

    Config and generation config follow: size, and the numbers of the tokens that they name. The
    tokenizer must follow, too (`narrow_tokenizer`); `prune_vocabulary` does both.

    Args:
        model: of any family, pruned before or not; with a task head, tied or not, or without.
        kept: numbers of tokens; those that the config names must be among them.

    Raises:
        ConfigError: when one is out of range, or one that the config names is missing.
        UnsupportedModelError: when the model has several vocabularies, or none of rows.
    """
    size, fixed = _size(model), _fixed(model)
    missing = {token for token in fixed if token < size} - set(kept)
    if missing or not kept or not all(0 <= token < size for token in kept):
        raise ConfigError(
            f"of {size} tokens, those to keep must be within 0 and {size - 1}, and those that the "
            f"config names among them: {sorted(missing)[:5]} are missing."
        )
    new = {old: index for index, old in enumerate(sorted(set(kept)))}
    if len(new) == size:
        return
    axes, config = _axes(model), copy.deepcopy(model.config)
    before = _built(model, copy.deepcopy(config))
    _renumber_all_(config, new)
    after = _built(model, config)
    _narrow_tensors_(model, axes, torch.tensor(list(new)))
    _follow_(model, before, after)
    _renumber_all_(model.config, new)
    for generation in _generation(model):
        _renumber_(generation, new)
    _record_(model, axes)


def _record_(model: PreTrainedModel, axes: Collection[str]) -> None:
    """Bring the description up to date, where it speaks of what has changed."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    shapes, inside = get_shapes(model), base_model(model)
    prefix = "" if inside is model else f"{model.base_model_prefix}."
    changes = Changes()
    for name in axes:
        within = name.removeprefix(prefix) if name.startswith(prefix) else f"/{name}"
        if within in shapes.get("parameters", {}):
            changes.parameters.add(within)
        path = within.rpartition(".")[0]
        if path in shapes["modules"]:
            changes.modules.add(path)
    if changes.modules or changes.parameters:
        record_shapes_(model, changes)


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: "Iterable[str] | Mapping[int, int]",
    *,
    at_least: int = 1,
    at_most: int | None = None,
) -> Vocabulary:
    """Remove the tokens that do not occur, from a model in place and from a copy of its tokenizer.

    A text all of whose tokens stay gives the same logits as before, less the columns that went. Any
    other text is spelt with what is left, down to single characters or bytes; a WordPiece has
    `[UNK]` for the rest.

    Args:
        model: of any family, pruned before or not.
        tokenizer: the fast one of the model. It is not changed.
        texts: what the model is to be used for; or by token how often it occurs.
        at_least: a token that occurs as often stays.
        at_most: of these, only the most frequent stay.

    Returns:
        The new tokenizer, and which tokens are left.

    Raises:
        ConfigError: when a limit is not positive.
        DataError: when there is no text.
        UnsupportedModelError: for a slow tokenizer, or a model with several vocabularies.
    """
    counts = texts if isinstance(texts, Mapping) else count_tokens(tokenizer, texts)
    chosen = choose_tokens(tokenizer, counts, at_least=at_least, at_most=at_most)
    data, size = describe(tokenizer), _size(model)
    known = set(tokens_of(data).values())
    beyond = [token for token in chosen if token >= size]
    if beyond:
        raise UnsupportedModelError(
            f"the tokenizer knows token {beyond[0]}, and the model has {size}: it is not the "
            "tokenizer of this model."
        )
    fixed = {token for token in _fixed(model) if token in known}
    kept = sorted(with_ways(data, fixed | set(chosen)))
    small = narrow_tokenizer(tokenizer, kept)
    keep_tokens(model, kept)
    return Vocabulary(small, tuple(kept), size)

"""A tokenizer with fewer tokens: its `tokenizer.json`, rewritten.

Which tokens a tokenizer cannot do without is read off its description. A text of which all tokens
stay is cut as before, into the same tokens under their new numbers:

- WordPiece takes the longest piece that it has; of fewer pieces, that one is still the longest.
- BPE joins the pair of the lowest rank. With a token stay all the tokens that lead to it, so that
  every merge on its way stays, and no other one can come before it.
- Unigram takes the pieces of the highest sum of scores. These stay, and so does the lowest of all
  scores, by which it rates what it does not know.
"""

import json
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prune.errors import ConfigError, UnsupportedModelError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
Description = dict[str, Any]
"""The content of a `tokenizer.json`."""


def describe(tokenizer: PreTrainedTokenizerBase) -> Description:
    """The content that `tokenizer.json` would have.

    Raises:
        UnsupportedModelError: for a tokenizer that is not one of the `tokenizers` library.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json: load the fast tokenizer of the "
            "model (AutoTokenizer)."
        )
    data: Description = json.loads(backend.to_str())
    if _kind(data) not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise UnsupportedModelError(f"tokenizers of kind {_kind(data)!r} are not known.")
    return data


def _kind(data: Description) -> str:
    return str(data["model"].get("type"))


def _pieces(data: Description) -> dict[str, int]:
    """The tokens of the model proper, without added ones."""
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {entry[0]: index for index, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def tokens_of(data: Description) -> dict[str, int]:
    """All tokens and their numbers."""
    return _pieces(data) | {token["content"]: token["id"] for token in data["added_tokens"]}


def _marks(data: Description) -> tuple[str, str]:
    """What is written before a piece that continues a word, and behind one that ends it."""
    model = data["model"]
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _is_character(token: str, before: str, behind: str) -> bool:
    if before and len(token) > len(before):
        token = token.removeprefix(before)
    if behind and len(token) > len(behind):
        token = token.removesuffix(behind)
    return len(token) == 1


def needed(data: Description) -> set[int]:
    """The tokens without which not every text could be encoded, or would not be as before.

    These are all added and special tokens, those that are put around a text, the unknown one,
    bytes, and single characters where there are not all 256 bytes to spell them with.
    """
    model, pieces = data["model"], _pieces(data)
    found = {token["id"] for token in data["added_tokens"]}
    found |= set(_in_processor(data.get("post_processor")))
    if data.get("padding"):
        found.add(data["padding"]["pad_id"])
    if model.get("unk_token") in pieces:
        found.add(pieces[model["unk_token"]])
    if _kind(data) == "Unigram":
        scores = [score for _, score in model["vocab"]]
        found.add(scores.index(min(scores)))
        found |= set() if model.get("unk_id") is None else {model["unk_id"]}
    spelt = {index for token, index in pieces.items() if _BYTE.fullmatch(token)}
    if not (model.get("byte_fallback") and len(spelt) == 256):
        marks = _marks(data)
        spelt |= {index for token, index in pieces.items() if _is_character(token, *marks)}
    return found | spelt


class _Merges:
    """The merges of a BPE, by pair: their rank and what they give."""

    def __init__(self, data: Description) -> None:
        self.pieces = _pieces(data)
        self.before, self.behind = _marks(data)
        self.rank = {
            pair: rank for rank, pair in enumerate(map(_pair, data["model"].get("merges", [])))
        }

    def joined(self, pair: tuple[str, str]) -> str:
        """What a merge gives."""
        return pair[0] + pair[1].removeprefix(self.before)

    def _start(self, token: str) -> list[str]:
        """A token as single characters, marked as they are within a word."""
        text = token.removesuffix(self.behind) if self.behind else token
        text = text.removeprefix(self.before)
        parts = [self.before + character for character in text]
        if parts and not token.startswith(self.before):
            parts[0] = text[0]
        if parts and self.behind and text != token:
            parts[-1] += self.behind
        return parts

    def way(self, token: str) -> Iterator[str]:
        """The characters and all that they become while they are joined to a token."""
        parts = self._start(token)
        yield from parts
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                return
            place = pairs.index(best)  # of equal ranks the first
            parts[place : place + 2] = [self.joined(best)]
            yield parts[place]


def _pair(merge: "str | list[str]") -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def with_ways(data: Description, kept: Iterable[int]) -> set[int]:
    """Some tokens, and those from which they are joined: what a BPE needs to find them."""
    result = set(kept)
    if _kind(data) != "BPE":
        return result
    merges = _Merges(data)
    names = {index: token for token, index in merges.pieces.items()}
    for index in list(result):
        if index in names:
            result |= {
                merges.pieces[part] for part in merges.way(names[index]) if part in merges.pieces
            }
    return result


def rewrite(data: Description, kept: Collection[int]) -> Description:
    """The description of a tokenizer that has some tokens only, numbered in their old order.

    Args:
        data: of the old one; it is not changed.
        kept: numbers of tokens, `needed` and `with_ways` among them.
    """
    new = {old: index for index, old in enumerate(sorted(kept))}
    data = json.loads(json.dumps(data))
    model = data["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
    else:
        model["vocab"] = {t: new[old] for t, old in model["vocab"].items() if old in new}
    if model.get("unk_id") is not None:
        model["unk_id"] = new[model["unk_id"]]
    if "merges" in model:
        merges = _Merges(data)
        model["merges"] = [
            list(pair)
            for pair in merges.rank
            if pair[0] in merges.pieces
            and pair[1] in merges.pieces
            and merges.joined(pair) in merges.pieces
        ]
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    if data.get("padding"):
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    _renumber_processor_(data.get("post_processor"), new)
    return data


def _in_processor(processor: "Description | None") -> Iterator[int]:
    """The tokens that are put around a text."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        yield from _in_processor(part)
    for token in (processor.get("special_tokens") or {}).values():
        yield from token["ids"]
    yield from (processor[name][1] for name in ("sep", "cls") if name in processor)


def _renumber_processor_(processor: "Description | None", new: Mapping[int, int]) -> None:
    """Let what is put around a text have the new numbers."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _renumber_processor_(part, new)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[index] for index in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            content, index = processor[name]
            processor[name] = [content, new[index]]


def narrow_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kept: Collection[int]
) -> PreTrainedTokenizerBase:
    """A tokenizer that has some tokens of another one only, numbered in their old order.

    Args:
        tokenizer: a fast one. It is not changed.
        kept: numbers of tokens, `needed` and `with_ways` among them.

    Raises:
        ConfigError: when a token is missing that it cannot do without.
        UnsupportedModelError: when it is no fast tokenizer, or its class would not take the new
            vocabulary as it is.
    """
    data = describe(tokenizer)
    missing = needed(data) - set(kept)
    if missing:
        raise ConfigError(
            f"a tokenizer cannot do without its special tokens and its characters: {len(missing)} "
            f"are missing, token {min(missing)} among them. Let `choose_tokens` choose."
        )
    data = rewrite(data, kept)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in tokenizer.vocab_files_names.values():
            (folder / file).unlink(missing_ok=True)
        text = json.dumps(data, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        settings_file = folder / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # all of it is in tokenizer.json
        settings_file.write_text(json.dumps(settings), encoding="utf-8")
        result: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    result.name_or_path = tokenizer.name_or_path
    result.init_kwargs["name_or_path"] = tokenizer.name_or_path
    differ = {key for key, value in describe(result).items() if value != data.get(key)}
    if result.get_vocab() != tokens_of(data) or differ - {"padding", "truncation"}:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} builds a vocabulary of its own beside tokenizer.json: "
            "its tokens cannot be taken away."
        )
    return result

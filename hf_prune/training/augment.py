"""Data augmentation for distillation: words replaced by others that fit, seeded by the text.

Source: Jiao et al. 2019, arXiv:1909.10351: words of one token by what a masked language model
expects in their place, others by neighbours in the space of embeddings. Theirs are GloVe's; ours
are the model's own, the mean over the tokens of a word.
"""

import hashlib
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.errors import ConfigError

_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass
class Augmenter:
    """Makes variants of a text.

    Attributes:
        tokenizer: of both models.
        embeddings: `[V, E]`, input embeddings, for neighbours.
        masked: a masked language model; None: neighbours for all words.
        candidates: how many replacements of a word are drawn from.
        probability: of replacing a word.
        seed: with the text, of what is drawn: neither order nor batch nor process matter.
    """

    tokenizer: PreTrainedTokenizerBase
    embeddings: Tensor
    masked: PreTrainedModel | None = None
    candidates: int = 15
    probability: float = 0.4
    seed: int = 0
    _neighbours: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1 or self.candidates < 1:
            raise ConfigError(
                f"probability={self.probability} must be in (0, 1], and candidates="
                f"{self.candidates} at least 1."
            )
        if self.masked is not None and self.tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token: augment by neighbours only.")
        unit = torch.nn.functional.normalize(self.embeddings.detach().float(), dim=-1)
        self.vocabulary = {
            index: word
            for word, index in self.tokenizer.get_vocab().items()
            if _WORD.fullmatch(word) and index < len(unit)
        }
        self.indices = torch.tensor(sorted(self.vocabulary))
        self.unit = unit[self.indices]  # [words, E]

    def _nearest(self, word: str) -> list[str]:
        """The words whose embeddings are closest to the mean of the word's tokens."""
        if word not in self._neighbours:
            tokens = self.tokenizer(word, add_special_tokens=False)["input_ids"]
            mean = self.embeddings[torch.tensor(tokens)].detach().float().mean(dim=0)
            near = (self.unit @ mean).topk(min(self.candidates + 1, len(self.unit))).indices
            words = [self.vocabulary[int(self.indices[i])] for i in near]
            self._neighbours[word] = [w for w in words if w != word.lower()][: self.candidates]
        return self._neighbours[word]

    @torch.no_grad()
    def _expected(self, text: str, start: int, end: int) -> list[str]:
        """What the masked language model expects in the place of a word."""
        assert self.masked is not None  # noqa: S101  # asked by the caller
        masked = f"{text[:start]}{self.tokenizer.mask_token}{text[end:]}"
        inputs = self.tokenizer(masked, truncation=True, return_tensors="pt")
        places = (inputs["input_ids"][0] == self.tokenizer.mask_token_id).nonzero().flatten()
        if not len(places):
            return []  # cut off
        device = self.masked.device
        logits = self.masked(**{k: v.to(device) for k, v in inputs.items()}).logits[0, places[0]]
        best = logits[self.indices.to(device)].topk(min(self.candidates, len(self.indices)))
        return [self.vocabulary[int(self.indices[i])] for i in best.indices.cpu()]

    def _replacements(self, text: str, match: re.Match[str]) -> list[str]:
        tokens = self.tokenizer(match.group(), add_special_tokens=False)["input_ids"]
        if self.masked is not None and len(tokens) == 1:
            return self._expected(text, match.start(), match.end())
        return self._nearest(match.group())

    def variant(self, text: str, copy: int) -> str:
        """The `copy`-th variant of a text: the same whenever it is asked for."""
        generator = random.Random(zlib.crc32(text.encode(), self.seed * 1_000_003 + copy))
        pieces, end = [], 0
        for match in _WORD.finditer(text):
            if generator.random() >= self.probability:
                continue
            found = self._replacements(text, match)
            if found:
                pieces += [text[end : match.start()], generator.choice(found)]
                end = match.end()
        return "".join([*pieces, text[end:]])

    def fingerprint(self, *more: object) -> str:
        """A name for the result, by which `datasets` knows it again.

        Of all that a variant depends on: both models' weights, and what the tokenizer does.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        spelling = self.tokenizer.get_vocab() if backend is None else backend.to_str()
        masked = {} if self.masked is None else self.masked.state_dict()
        words = [
            *(self.candidates, self.probability, self.seed),
            *(spelling, self.tokenizer.mask_token, self.tokenizer.model_max_length),
            *(None if self.masked is None else self.masked.config.to_json_string(), more),
        ]
        digest = hashlib.sha256(repr(words).encode())
        for name, tensor in {"embeddings": self.embeddings, **masked}.items():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


def augment(
    rows: Dataset, augmenter: Augmenter, columns: Sequence[str] = ("text",), copies: int = 4
) -> Dataset:
    """A dataset followed by variants of its rows, `copies` of each. Labels stay.

    Args:
        rows: with columns of text.
        augmenter: makes the variants.
        columns: the texts; all others are copied.
        copies: variants of each row.
    """

    def change(batch: dict[str, list[Any]], copy: int) -> dict[str, list[Any]]:
        return {name: [augmenter.variant(text, copy) for text in batch[name]] for name in columns}

    parts = [rows]
    name = augmenter.fingerprint(rows._fingerprint, tuple(columns))
    for copy in range(copies):
        part = rows.map(
            change,
            batched=True,
            fn_kwargs={"copy": copy},
            new_fingerprint=f"{name}-{copy}",
            desc=f"Augmenting {copy + 1} of {copies}",
        )
        parts.append(part)
    return concatenate_datasets(parts)

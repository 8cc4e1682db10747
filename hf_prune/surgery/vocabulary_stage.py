"""One stage of the vocabulary: pruned, and proved to say the same on tokens that are left."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.errors import ConfigError, DataError, NumericsError, PlanError
from hf_prune.recipe import Vocabulary as Stage
from hf_prune.statistics.example import example_batch
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.vocabulary import Vocabulary, choose_tokens, count_tokens, prune_vocabulary

_PROBE = 16
_OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")


def read_texts(path: Path) -> list[str]:
    """The lines of a file in UTF-8.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"the texts of the vocabulary cannot be read: {error}") from error


def texts_of(stage: Stage, texts: Iterable[str] | None) -> Iterable[str]:
    """The texts that a stage names, or else those that are given.

    Raises:
        ConfigError: when there are none.
        DataError: when a file cannot be read.
    """
    if stage.texts is not None:
        return read_texts(Path(stage.texts))
    if texts is None:
        raise ConfigError(
            "which tokens are needed? Name a file in the stage (texts: ...), or pass texts."
        )
    return texts


@torch.no_grad()
def _say(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """What a model says about some tokens: logits or hidden states."""
    batch = example_batch(model, 1, len(tokens))
    for name in ("input_ids", "decoder_input_ids"):
        if name in batch:
            batch[name] = torch.tensor([tokens], device=model.device)  # [1, T]
    with in_eval(model):
        output = model(**batch)
    found: Tensor = next(output[key] for key in _OUTPUTS if key in output)
    return found


def _check_same(before: Tensor, after: Tensor, kept: tuple[int, ...]) -> float:
    """The largest difference between two outputs, those of tokens that went left out.

    Raises:
        NumericsError: when it is not small.
    """
    if before.shape != after.shape:
        before = before[..., list(kept)]
    difference = float((before - after).abs().max())
    tolerance = 1e-4 if before.dtype == torch.float32 else 2e-2
    if not difference <= tolerance * max(1.0, float(before.abs().max())):
        raise NumericsError(
            f"with the smaller vocabulary the model says something else: outputs differ by "
            f"{difference:.2e}. Nothing was written."
        )
    return difference


def prune_checked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: "Iterable[str] | Mapping[int, int]",
    *,
    at_least: int = 1,
    at_most: int | None = None,
) -> tuple[Vocabulary, float]:
    """`prune_vocabulary`, and what the model says compared before and after.

    Returns:
        What is left, and by how much outputs differ on tokens that are left.

    Raises:
        NumericsError: when the model would say something else.
    """
    counts = texts if isinstance(texts, Mapping) else count_tokens(tokenizer, texts)
    chosen = set(choose_tokens(tokenizer, counts, at_least=at_least, at_most=at_most))
    often = sorted(counts, key=lambda token: (-counts[token], token))
    probe = [token for token in often if token in chosen][:_PROBE]
    before = _say(model, probe)
    done = prune_vocabulary(model, tokenizer, counts, at_least=at_least, at_most=at_most)
    new = {old: index for index, old in enumerate(done.kept)}
    after = _say(model, [new[token] for token in probe])
    return done, _check_same(before, after, done.kept)


def narrow_masks(
    model: PreTrainedModel, masks: Mapping[str, Tensor], kept: tuple[int, ...]
) -> dict[str, Tensor]:
    """The masks of single weights for a model whose vocabulary was pruned.

    Args:
        model: after it.
        masks: by parameter name, of the model before.
        kept: old numbers of the tokens that are left.
    """
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    found = dict(masks)
    for name, mask in masks.items():
        for axis, (old, now) in enumerate(zip(mask.shape, shapes[name], strict=True)):
            if old != now:
                found[name] = mask.index_select(axis, torch.tensor(kept, device=mask.device))
    return found


def prune_vocabulary_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    texts: "Iterable[str] | Mapping[int, int]",
) -> tuple[Vocabulary, dict[str, Any]]:
    """Prune the vocabulary of a model in place, as a stage says.

    Args:
        model: of any family, pruned before or not.
        tokenizer: the fast one of the model. It is not changed.
        stage: limits.
        texts: what the model is to be used for; or by token how often it occurs.

    Returns:
        What is left, and the entry for the report.

    Raises:
        DataError: when there is no text.
        NumericsError: when the model would say something else.
        PlanError: on every process, when two of them keep other tokens.
        UnsupportedModelError: for a slow tokenizer, or a model with several vocabularies.
    """
    done, difference = prune_checked(
        model, tokenizer, texts, at_least=stage.at_least, at_most=stage.at_most
    )
    if PartialState().num_processes > 1 and len(set(gather_object([done.kept]))) > 1:
        raise PlanError("processes keep other tokens: pass the same texts to all of them.")
    entry = {
        "kind": "vocabulary",
        "total": done.before,
        "removed": done.before - len(done.kept),
        "kept": len(done.kept),
        "difference": difference,
    }
    return done, entry

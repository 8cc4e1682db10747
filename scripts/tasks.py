"""What the scripts can be asked to do: for each task its data, its model, and its measure."""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Sequence as SequenceFeature
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_prune.errors import DataError
from hf_prune.measure.metrics import evaluate
from hf_prune.statistics.batches import to_device
from hf_prune.statistics.collect import sum_over_processes

Batches = Iterable[Mapping[str, torch.Tensor]]
Tokenizer = PreTrainedTokenizerBase


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset that a task reads."""

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as the Hub calls it.
        auto_class: of transformers.
        columns: what is read if nothing else is named.
        classes: the names of the classes, from the data; none for language models.
        encode: token ids and labels of all rows.
        collator: from a tokenizer.
        measure: figures of a model on batches.
    """

    name: str
    auto_class: Any
    columns: Columns
    classes: Callable[[DatasetDict, Columns], list[str]]
    encode: Callable[[DatasetDict, Tokenizer, Columns, int], DatasetDict]
    collator: Callable[[Tokenizer], Any]
    measure: Callable[[PreTrainedModel, Batches], dict[str, float]]


def read_conll(path: str | Path) -> tuple[list[list[str]], list[list[str]]]:
    """Words and tags of a file: a word, a tab and its tag on a line, a blank one after each text.

    Raises:
        DataError: naming the line that is neither.
    """
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split("\t")
        if not line.strip():
            if words[-1]:
                words.append([])
                tags.append([])
        elif len(parts) < 2 or not parts[1].strip():
            raise DataError(f"{path}, line {number}: expected a word, a tab and a tag.")
        else:
            words[-1].append(parts[0])
            tags[-1].append(parts[1].strip())
    if not words[-1]:
        words.pop()
        tags.pop()
    return words, tags


def conll_data(files: Mapping[str, str]) -> DatasetDict:
    """A dataset with the columns `tokens` and `tags`, from CoNLL files by split."""
    read = {split: read_conll(path) for split, path in files.items()}
    names = sorted({tag for _, tags in read.values() for row in tags for tag in row})
    features = Features(
        {
            "tokens": SequenceFeature(Value("string")),
            "tags": SequenceFeature(ClassLabel(names=names)),
        }
    )
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"tokens": words, "tags": [[names.index(t) for t in row] for row in tags]},
                features=features,
            )
            for split, (words, tags) in read.items()
        }
    )


def text_data(files: Mapping[str, str]) -> DatasetDict:
    """A dataset with the column `text`, one line a row, from files of plain text by split."""
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": Path(path).read_text(encoding="utf-8").splitlines(keepends=True)}
            )
            for split, path in files.items()
        }
    )


def file_data(task: str, files: Mapping[str, str]) -> DatasetDict:
    """The dataset in local files: CoNLL, plain text, or what `datasets` reads (CSV, JSON)."""
    if task == "token-classification":
        return conll_data(files)
    if task == "text-generation":
        return text_data(files)
    kind = Path(next(iter(files.values()))).suffix.removeprefix(".").replace("jsonl", "json")
    return load_dataset(kind, data_files=dict(files))


def _feature_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _text_classes(data: DatasetDict, columns: Columns) -> list[str]:
    found = _feature_names(data["train"].features[columns.label])
    names = found or [str(value) for value in sorted(set(data["train"][columns.label]))]
    for part, rows in data.items():
        for index, label in enumerate(rows[columns.label]):
            if not isinstance(label, int) or not 0 <= label < len(names):
                raise DataError(
                    f"split {part}, row {index}: label {label!r} is not an integer in "
                    f"[0, {len(names)})."
                )
    return names


def _token_classes(data: DatasetDict, columns: Columns) -> list[str]:
    found = _feature_names(data["train"].features[columns.label])
    if found is None:
        raise DataError(f"the column {columns.label!r} holds no classes (ClassLabel).")
    return found


def _no_classes(data: DatasetDict, columns: Columns) -> list[str]:
    return []


def _encode_texts(
    data: DatasetDict, tokenizer: Tokenizer, columns: Columns, length: int
) -> DatasetDict:
    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(rows[columns.text], truncation=True, max_length=length)
        return {**encoded, "labels": rows[columns.label]}

    return data.map(
        encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing"
    )


def _encode_words(
    data: DatasetDict, tokenizer: Tokenizer, columns: Columns, length: int
) -> DatasetDict:
    """The first token of each word has its label; the others have -100."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            rows[columns.text], truncation=True, max_length=length, is_split_into_words=True
        )
        labels = []
        for index, tags in enumerate(rows[columns.label]):
            words = encoded.word_ids(index)
            before = [None, *words[:-1]]
            labels.append(
                [
                    -100 if word is None or word == last else tags[word]
                    for word, last in zip(words, before, strict=True)
                ]
            )
        return {**encoded, "labels": labels}

    return data.map(
        encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing"
    )


def _token_span(offsets: Any, kinds: Any, start: int, end: int) -> tuple[int, int]:
    """First and last token of an answer at these characters; (0, 0) where it is cut off."""
    inside = [
        t
        for t, ((a, b), kind) in enumerate(zip(offsets, kinds, strict=True))
        if kind == 1 and a < end and b > start
    ]
    whole = inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def _encode_questions(
    data: DatasetDict, tokenizer: Tokenizer, columns: Columns, length: int
) -> DatasetDict:
    """One window for each question: the end of a long context is cut off."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            [question.strip() for question in rows["question"]],
            rows[columns.text],
            truncation="only_second",
            max_length=length,
            return_offsets_mapping=True,
        )
        spans = []
        for index, answer in enumerate(rows[columns.label]):
            if not answer["text"]:
                spans.append((0, 0))
                continue
            start = answer["answer_start"][0]
            end = start + len(answer["text"][0])
            offsets = encoded["offset_mapping"][index]
            spans.append(_token_span(offsets, encoded.sequence_ids(index), start, end))
        encoded.pop("offset_mapping")
        starts, ends = zip(*spans, strict=True)
        return {**encoded, "start_positions": list(starts), "end_positions": list(ends)}

    return data.map(
        encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing"
    )


def _encode_blocks(
    data: DatasetDict, tokenizer: Tokenizer, columns: Columns, length: int
) -> DatasetDict:
    """All text in a row, cut into blocks of equal length; what is left over is dropped."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        text = "".join(rows[columns.text])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return {
            "input_ids": blocks,
            "attention_mask": [[1] * length for _ in blocks],
            "labels": [list(block) for block in blocks],
        }

    return data.map(
        encode,
        batched=True,
        batch_size=10_000,
        remove_columns=data["train"].column_names,
        desc="Tokenizing",
    )


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Spans and types of entities in a row of BIO tags. An `I-` that continues none begins one."""
    found: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        if kind and (prefix != "I" or this != kind):
            found.add((start, index, kind))
            kind = ""
        if prefix in ("B", "I") and not kind:
            start, kind = index, this
    return found


def _forward(model: PreTrainedModel, batches: Batches) -> Iterable[tuple[dict[str, Any], Any]]:
    training = model.training
    model.eval()
    try:
        for batch in batches:
            moved = to_device(batch, model.device)
            with torch.inference_mode():
                yield moved, model(**moved)
    finally:
        model.train(training)


def _measure_texts(model: PreTrainedModel, batches: Batches) -> dict[str, float]:
    return evaluate(model, batches)


def _total(model: PreTrainedModel, sums: Sequence[float]) -> list[float]:
    found = sum_over_processes(torch.tensor(sums, dtype=torch.float64, device=model.device))
    return [float(value) for value in found.tolist()]


def _measure_words(model: PreTrainedModel, batches: Batches) -> dict[str, float]:
    """F1 of whole entities, in [0, 1], and accuracy of words."""
    names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
    sums = [0.0] * 6  # hits, predicted, expected, right, words, rows
    for batch, output in _forward(model, batches):
        pairs = zip(output.logits.argmax(dim=-1).tolist(), batch["labels"].tolist(), strict=True)
        for found, wanted in pairs:
            kept = [(f, w) for f, w in zip(found, wanted, strict=True) if w != -100]
            ours, theirs = (entities([names[i] for i in row]) for row in zip(*kept, strict=True))
            right = sum(f == w for f, w in kept)
            row = (len(ours & theirs), len(ours), len(theirs), right, len(kept), 1)
            sums = [a + b for a, b in zip(sums, row, strict=True)]
    hits, predicted, expected, correct, words, rows = _total(model, sums)
    f1 = 2 * hits / (predicted + expected) if predicted + expected else 0.0
    return {"f1": f1, "accuracy": correct / max(words, 1), "examples": rows}


def _measure_questions(model: PreTrainedModel, batches: Batches) -> dict[str, float]:
    """Exact match of the best span of tokens, and F1 of its tokens, in [0, 1]."""
    sums = [0.0] * 3  # exact, f1, rows
    for batch, output in _forward(model, batches):
        scores = output.start_logits[:, :, None] + output.end_logits[:, None, :]  # [B, T, T]
        mask = batch["attention_mask"].bool()
        valid = torch.ones_like(scores[0], dtype=torch.bool).triu().tril(29)  # 30 tokens at most
        scores = scores.masked_fill(~(valid & mask[:, :, None] & mask[:, None, :]), -math.inf)
        best = scores.flatten(1).argmax(dim=1).tolist()
        tokens = scores.shape[-1]
        starts, ends = batch["start_positions"].tolist(), batch["end_positions"].tolist()
        for place, start, end in zip(best, starts, ends, strict=True):
            ours = collections.Counter(range(place // tokens, place % tokens + 1))
            theirs = collections.Counter(range(start, end + 1))
            common = sum((ours & theirs).values())
            f1 = 2 * common / (sum(ours.values()) + sum(theirs.values()))
            sums = [sums[0] + (ours == theirs), sums[1] + f1, sums[2] + 1]
    exact, overlap, rows = _total(model, sums)
    if not rows:
        raise DataError("there is nothing to evaluate.")
    return {"exact_match": exact / rows, "f1": overlap / rows, "examples": rows}


def _measure_blocks(model: PreTrainedModel, batches: Batches) -> dict[str, float]:
    """Perplexity: the exponential of the mean loss of all predicted tokens."""
    sums = [0.0] * 2  # loss, tokens
    for batch, output in _forward(model, batches):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        sums = [sums[0] + float(output.loss) * tokens, sums[1] + tokens]
    loss, count = _total(model, sums)
    if not count:
        raise DataError("there is nothing to evaluate: the text is shorter than one block.")
    return {"perplexity": math.exp(loss / count), "loss": loss / count, "examples": count}


TASKS = {
    task.name: task
    for task in (
        Task(
            "text-classification",
            AutoModelForSequenceClassification,
            Columns("text", "label"),
            _text_classes,
            _encode_texts,
            DataCollatorWithPadding,
            _measure_texts,
        ),
        Task(
            "token-classification",
            AutoModelForTokenClassification,
            Columns("tokens", "tags"),
            _token_classes,
            _encode_words,
            DataCollatorForTokenClassification,
            _measure_words,
        ),
        Task(
            "question-answering",
            AutoModelForQuestionAnswering,
            Columns("context", "answers"),
            _no_classes,
            _encode_questions,
            DataCollatorWithPadding,
            _measure_questions,
        ),
        Task(
            "text-generation",
            AutoModelForCausalLM,
            Columns("text", "text"),
            _no_classes,
            _encode_blocks,
            lambda tokenizer: default_data_collator,
            _measure_blocks,
        ),
    )
}
"""Every task, by its name on the Hub."""

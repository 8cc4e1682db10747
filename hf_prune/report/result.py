"""The result of a compression: model, plan, report. And how it lies on disk."""

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.checkpoint.folder import staged_folder
from hf_prune.checkpoint.save import write_model
from hf_prune.measure.counts import (
    count_bytes,
    count_encoder_parameters,
    count_macs,
    count_nonzero,
    count_parameters,
)
from hf_prune.plan import Plan
from hf_prune.recipe import Recipe
from hf_prune.report.card import render_card
from hf_prune.report.picture import draw_plan

REPORT_VERSION = 1
"""Version of `report.json`."""


@dataclass
class Result:
    """What a compression gives back.

    `masks` says which single weights stay (pass them to `KeepZeros` when training goes on); it is
    empty where no single weight was pruned. `plan` speaks of layers by the paths that they had
    before; `layers` says which path each had, where some left their list.
    """

    model: PreTrainedModel
    plan: Plan
    report: dict[str, Any]
    recipe: Recipe
    masks: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    layers: dict[str, str] = field(default_factory=dict)


def measure_stage(model: PreTrainedModel, sequence_length: int) -> dict[str, Any]:
    """The exact counts of a model: the keys that every stage of a report has."""
    return {
        "parameters": count_parameters(model),
        "encoder_parameters": count_encoder_parameters(model),
        "nonzero_parameters": count_nonzero(model),
        "macs": count_macs(model, sequence_length),
        "bytes": count_bytes(model),
    }


def environment() -> dict[str, Any]:
    """Versions and hardware, for a report. No path, no host name, no user."""
    packages = ("hf_prune", "torch", "transformers", "accelerate", "datasets", "safetensors")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in packages},
    }


def new_report(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """A report without figures yet."""
    return {
        "version": REPORT_VERSION,
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "environment": environment(),
        "pruning": [],
        "stages": {},
    }


def save_result(result: Result, out: "str | Path", *, overwrite: bool = False) -> None:
    """Write a result into a folder, all of it or nothing.

    The folder has `model/`, `plan.json`, `recipe.yaml`, `report.json`, `README.md` and `units.svg`.

    Raises:
        OutputExistsError: when `out` exists and `overwrite` is off: nothing was written.
        NumericsError: when a weight is not finite: nothing was written.
    """
    with staged_folder(Path(out), overwrite=overwrite) as stage:
        write_parts(result, stage)
        (stage / "model").mkdir()
        standalone = result.recipe.standalone
        write_model(result.model, stage / "model", result.tokenizer, standalone=standalone)


def write_parts(result: Result, folder: Path) -> None:
    """Write everything but the model into a folder."""
    report = json.dumps(result.report, indent=1, allow_nan=False)
    (folder / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    (folder / "recipe.yaml").write_text(result.recipe.to_yaml(), encoding="utf-8")
    (folder / "report.json").write_text(report + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render_card(result.report), encoding="utf-8")
    draw_plan(result.plan, folder / "units.svg")

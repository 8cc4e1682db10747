"""The result of a compression: model, plan, report. And how it lies on disk."""

import json
import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.checkpoint.folder import staged_folder
from hf_prune.checkpoint.save import Storage, write_model
from hf_prune.errors import CheckpointError
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


def check_storage(recipe: Recipe, storage: Storage) -> None:
    """Refuse a way to store a model that contradicts its recipe.

    Raises:
        CheckpointError: for bitmask storage of what is to load without hf_prune.
    """
    alone = [name for name in ("portable", "standalone") if getattr(recipe, name)]
    if storage == "bitmask" and alone:
        raise CheckpointError(
            f"bitmask storage is read by hf_prune, and {alone[0]}: true asks for a model that "
            "loads without it: leave one of them out."
        )


def save_result(
    result: Result, out: "str | Path", *, overwrite: bool = False, storage: Storage = "dense"
) -> dict[str, int]:
    """Write a result into a folder, all of it or nothing.

    The folder has `model/`, `plan.json`, `recipe.yaml`, `report.json`, `README.md` and `units.svg`.

    Args:
        result: of `compress`.
        out: the folder.
        overwrite: replace an existing one.
        storage: of the model, as in `save_model`: `dense` or `bitmask`.

    Returns:
        With bitmask storage the bytes of the weight files, `bytes_dense` and `bytes_stored`, which
        `report.json` then has as `storage`.

    Raises:
        OutputExistsError: when `out` exists and `overwrite` is off: nothing was written.
        NumericsError: when a weight is not finite: nothing was written.
        CheckpointError: when the recipe asks for a model that loads without hf_prune, and `storage`
            for one that does not: nothing was written.
    """
    check_storage(result.recipe, storage)
    with staged_folder(Path(out), overwrite=overwrite) as stage:
        (stage / "model").mkdir()
        sizes = write_model(
            result.model,
            stage / "model",
            result.tokenizer,
            standalone=result.recipe.standalone,
            storage=storage,
        )
        report = {**result.report, "storage": sizes} if sizes else result.report
        write_parts(replace(result, report=report), stage)
    return sizes


def write_parts(result: Result, folder: Path) -> None:
    """Write everything but the model into a folder."""
    report = json.dumps(result.report, indent=1, allow_nan=False)
    (folder / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    (folder / "recipe.yaml").write_text(result.recipe.to_yaml(), encoding="utf-8")
    (folder / "report.json").write_text(report + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render_card(result.report), encoding="utf-8")
    draw_plan(result.plan, folder / "units.svg")

"""What an ordinary Trainer needs to be told, where callbacks cannot reach it."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_prune.errors import ConfigError
from hf_prune.statistics.batches import is_causal_lm
from hf_prune.training.distill import DistillCallback

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def _names_in(folder: Path) -> set[str]:
    """The names under which a checkpoint holds its weights; none, if it holds them otherwise."""
    if (folder / INDEX).is_file():
        return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SINGLE).is_file():
        return set()
    with safe_open(folder / SINGLE, framework="pt") as file:
        return set(file.keys())


def _load_renamed(model: Any, folder: str | None) -> None:
    """Load the weights of a checkpoint whose names on disk are others than in memory.

    The Trainer hands them to `load_state_dict`, which leaves weights of other names as they are.
    """
    if folder is None or not isinstance(model, PreTrainedModel):
        return
    if _names_in(Path(folder)) <= model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _load_all_names(trainer: Trainer) -> None:
    """Let a Trainer resume, and load its best model, whatever names its checkpoints use."""
    load, load_best = trainer._load_from_checkpoint, trainer._load_best_model

    def from_checkpoint(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load(resume_from_checkpoint, model)
        plain = trainer.accelerator.unwrap_model(trainer.model if model is None else model)
        _load_renamed(plain, resume_from_checkpoint)

    def best() -> None:
        load_best()
        model = trainer.accelerator.unwrap_model(trainer.model)
        _load_renamed(model, trainer.state.best_model_checkpoint)

    trainer._load_from_checkpoint = from_checkpoint  # type: ignore[method-assign]  # of this one only
    trainer._load_best_model = best  # type: ignore[method-assign]  # the same


def prepare_trainer(trainer: Trainer) -> Trainer:
    """Make a Trainer weigh losses right, load all weights, and show our figures to all trackers.

    Without it training works too, but for three things. Models that take a mean over their batch,
    whatever number of items they are told, are trained by the Trainer of transformers 5 with a loss
    that grows with gradient accumulation and with processes; here it is divided as it must be. And
    reporting callbacks see a log before callbacks of the user have added to it; here ours go first.
    And resuming, and `load_best_model_at_end`, leave weights as they are whose names on disk differ
    from those in memory, as ViT's do; here they are loaded.

    Returns:
        The same trainer.

    Raises:
        ConfigError: for a loss function of its own beside a `DistillCallback`, which it would
            replace.
    """
    callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
    taught = any(isinstance(callback, DistillCallback) for callback in callbacks)
    if taught and trainer.compute_loss_func is not None:
        raise ConfigError(
            "compute_loss_func replaces the loss of the model, and with it what DistillCallback "
            "adds: leave one of the two out, or compute that loss in the model's forward()."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_causal_lm(model) and trainer.compute_loss_func is None:
        trainer.model_accepts_loss_kwargs = False
    _load_all_names(trainer)
    ours = [
        callback
        for callback in callbacks
        if any(kind.__module__.startswith("hf_prune.") for kind in type(callback).__mro__)
    ]
    trainer.callback_handler.callbacks = ours + [c for c in callbacks if c not in ours]
    return trainer

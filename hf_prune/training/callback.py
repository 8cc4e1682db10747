"""`PruneCallback`: a model gets smaller while any Trainer trains it."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_prune.budget.solvers import Selection
from hf_prune.errors import ConfigError
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, Recipe, load_recipe
from hf_prune.training.schedule import is_due, share
from hf_prune.training.structure import StructuredPruning
from hf_prune.training.zeros import WeightPruning
from hf_prune.weights.masks import count_kept

logger = logging.getLogger(__name__)


def _scheduled_stage(recipe: Recipe) -> Prune:
    stages = [stage for stage in recipe.prune_stages if stage.schedule is not None]
    if len(stages) != 1:
        raise ConfigError(
            f"PruneCallback needs a recipe with exactly one prune stage that has a schedule; "
            f"this one has {len(stages)}. Use compress() to prune in one shot, and one callback "
            "for each gradual stage."
        )
    return stages[0]


def _check_arguments(args: Any, state: Any) -> None:
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ConfigError(
            "PruneCallback does not support FSDP or DeepSpeed yet: use one process or DDP."
        )
    if args.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end would bring back weights from before the masks had closed. "
            "Turn it off while pruning, and use it in the recovery that follows."
        )
    if state.global_step > 0:
        raise ConfigError(
            f"this training resumes at step {state.global_step}, and the masks of the first part "
            "are not known. Start it anew."
        )


def rebind_optimizer_(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Make an optimizer hold a model's new parameters instead of the removed ones.

    Its state is emptied.

    Args:
        optimizer: made before parameters were replaced.
        names: by `id` of each old parameter.
        model: after they were replaced.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    parameters = dict(model.named_parameters())
    for group in inner.param_groups:
        group["params"] = [
            parameters[names[id(p)]] if id(p) in names else p for p in group["params"]
        ]
    inner.state.clear()


class PruneCallback(TrainerCallback):
    """Prunes a model on a schedule while any Trainer trains it.

    Gates close step by step; when training ends, what they closed is really removed, and
    `trainer.save_model(...)` writes a smaller model that plain `from_pretrained` loads. Works on
    one process and under DistributedDataParallel, where all processes take the same decision.

    Args:
        recipe: a `Recipe`, its path or its data, with exactly one prune stage that has a schedule.

    Attributes:
        plan: what stays, once training has ended.
        selection: what was asked and what was removed (heads and neurons).
        masks: which entries stay (single weights).

    Raises:
        ConfigError: for a recipe that cannot be followed while training.
    """

    def __init__(self, recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]") -> None:
        loaded = load_recipe(recipe)
        self.stage = _scheduled_stage(loaded)
        structural = self.stage.structural
        self.pruning: StructuredPruning | WeightPruning = (
            StructuredPruning(self.stage, loaded.seed) if structural else WeightPruning(self.stage)
        )
        self.plan: Plan | None = None
        self.reached = 0.0

    @property
    def selection(self) -> Selection | None:
        """What was asked and what is removed, of heads and neurons."""
        return self.pruning.selection if isinstance(self.pruning, StructuredPruning) else None

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Which entries stay, of single weights."""
        return self.pruning.masks if isinstance(self.pruning, WeightPruning) else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach gates, all open."""
        _check_arguments(args, state)
        self.reached, self.plan = 0.0, None
        self.pruning.start(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the gradients while they are there, as long as something is left to decide."""
        if self.reached < 1:
            self.pruning.observe()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold what is masked."""
        self.pruning.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, where the schedule says so."""
        schedule = self.stage.schedule
        if schedule is not None and is_due(schedule, state.global_step, state.max_steps):
            self._decide(share(schedule, state.global_step, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Really remove what the gates have closed."""
        if self.reached < 1:
            self._decide(1.0)
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        names = {id(p): name for name, p in model.named_parameters()}
        self.pruning.finish()
        self.plan = self._final_plan(model)
        if optimizer is not None:
            rebind_optimizer_(optimizer, names, model)

    def _decide(self, fraction: float) -> None:
        self.pruning.decide(fraction)
        self.reached = fraction
        logger.info("sparsity %.4f, kept %s", self.stage.fraction * fraction, self.pruning.kept())
        if fraction >= 1 and self.selection is not None and not self.selection.met:
            for outcome in self.selection.outcomes:
                logger.warning(
                    "%s: %d of %d could be removed; floors and ignored sites hold the rest",
                    outcome.cost,
                    outcome.removed,
                    outcome.asked,
                )

    def _final_plan(self, model: Any) -> Plan:
        if self.selection is not None:
            return self.selection.plan
        return Plan(model.config.model_type, weights=count_kept(self.masks))

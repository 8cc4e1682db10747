"""`PruneCallback`: a model gets smaller while any Trainer trains it."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hf_prune.budget.costs import Lengths, unit_cost
from hf_prune.budget.selection import Selection
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.measure.counts import count_parameters
from hf_prune.measure.lengths import site_lengths
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, Recipe, Schedule, load_recipe
from hf_prune.sites import find_sites
from hf_prune.statistics.batches import Batch
from hf_prune.training.aim import selection_from_dict, selection_to_dict
from hf_prune.training.interrupt import Interrupt
from hf_prune.training.joint import JointPruning
from hf_prune.training.learned import LearnedPruning
from hf_prune.training.optimizer import mask_gradients_, mask_states_, rebind_optimizer_
from hf_prune.training.rewind import PREFIX, restore_, snapshot
from hf_prune.training.schedule import bounds, is_due, share
from hf_prune.training.sharded import refuse_sharded
from hf_prune.training.state import (
    checkpoint_of,
    note_part,
    parts_of,
    read_state,
    write_state,
)
from hf_prune.training.structure import StructuredPruning
from hf_prune.training.zeros import WeightPruning
from hf_prune.weights.masks import count_kept

logger = logging.getLogger(__name__)


Pruning = StructuredPruning | LearnedPruning | WeightPruning | JointPruning


def _scheduled_stages(recipe: Recipe) -> tuple[Prune, ...]:
    stages = tuple(stage for stage in recipe.prune_stages if stage.schedule is not None)
    kinds = [stage.structural for stage in stages]
    joint = kinds == [True, False] and stages[0].schedule == stages[1].schedule
    if len(stages) != 1 and not joint:
        raise ConfigError(
            f"PruneCallback needs a recipe with exactly one prune stage that has a schedule, or "
            f"with two of the same schedule, heads and neurons and then weights; this one has "
            f"{len(stages)}. Use compress() to prune in one shot, and one callback for each "
            "gradual stage."
        )
    return stages


def _pruning(stages: tuple[Prune, ...], seed: int, calibration: Sequence[Batch] | None) -> Pruning:
    first = stages[0]
    if calibration is not None and (not first.structural or first.masks != "scored"):
        raise ConfigError(
            "calibration is for heads and neurons with masks: scored; single weights, and masks "
            "that are learned, see the batches of training: leave it out."
        )
    if not first.structural:
        return WeightPruning(first)
    structure: StructuredPruning | LearnedPruning
    if first.masks == "scored":
        structure = StructuredPruning(first, seed, calibration)
    else:
        structure = LearnedPruning(first, seed)
    if not stages[1:]:
        return structure
    if stages[1].single.pattern != "unstructured":
        raise ConfigError(
            f"pattern {stages[1].single.pattern} would lose its neighbours with the units that go "
            "in the same training: write two trainings, or leave the pattern out."
        )
    return JointPruning(structure, WeightPruning(stages[1]))


def _check_arguments(args: Any, stage: Prune) -> None:
    refuse_sharded(args, "PruneCallback")
    if getattr(args, "fp16", False) and stage.masks != "scored":
        raise ConfigError(
            "learned masks read gradients before float16's loss scale is taken off: use bf16."
        )


class PruneCallback(TrainerCallback):
    """Prunes a model on a schedule while any Trainer trains it.

    Gates close step by step; when training ends, what they closed is really removed, and
    `trainer.save_model(...)` writes a smaller model that plain `from_pretrained` loads. Works on
    one process and under DistributedDataParallel, where all processes take the same decision.

    What it knows is written beside each checkpoint of the Trainer, so that
    `train(resume_from_checkpoint=...)` goes on as if nothing had happened. With
    `load_best_model_at_end` only models of the full sparsity compete. Ctrl-C finishes the step,
    saves a checkpoint, and then raises KeyboardInterrupt.

    Args:
        recipe: a `Recipe`, its path or its data, with exactly one prune stage that has a schedule;
            or two, heads and neurons and then weights, which then tighten together.
        resume_from: folder of the checkpoint, when training resumes from another output folder.
        calibration: batches, dicts of tensors, of the process. With them every decision is the step
            of `compress`: any of its criteria, and output projections that are re-fitted. A run
            that is resumed needs the same ones. None: decisions are by the gradients of training.

    Attributes:
        plan: what stays, once training has ended.
        selection: what was asked and what was removed (heads and neurons).
        masks: which entries stay (single weights).
        entries: for the report, one for each stage, once training has ended.
        stopped: whether the metric fell below its floor, and the last good plan came back.

    Raises:
        ConfigError: for a recipe that cannot be followed while training.
    """

    def __init__(
        self,
        recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]",
        resume_from: "str | os.PathLike[str] | None" = None,
        *,
        calibration: Iterable[Batch] | None = None,
    ) -> None:
        loaded = load_recipe(recipe)
        self.stages = _scheduled_stages(loaded)
        if loaded.portable:  # a plain config says all widths, and these differ from layer to layer
            self.stages = tuple(stage.keeping_dead() for stage in self.stages)
        self.stage = self.stages[0]
        assert self.stage.schedule is not None  # noqa: S101  # that is how it was found
        self.schedule: Schedule = self.stage.schedule
        self.seed = loaded.seed
        self.resume_from = resume_from
        known = None if calibration is None else list(calibration)
        self.pruning = _pruning(self.stages, loaded.seed, known)
        self.interrupt = Interrupt()
        self._reset()

    def _reset(self) -> None:
        self.plan: Plan | None = None
        self.entries: list[dict[str, Any]] = []
        self.reached = 0.0
        self.stopped = False
        self.good: tuple[float, Selection | None] = (0.0, None)
        self.early: dict[str, Tensor] = {}
        self.seen: dict[str, Lengths] = {}

    @property
    def part(self) -> str:
        """Name of the state beside a checkpoint."""
        if isinstance(self.pruning, JointPruning):
            return "joint"
        return "structure" if self.stage.structural else "weights"

    @property
    def selection(self) -> Selection | None:
        """What was asked and what is removed, of heads and neurons."""
        return None if isinstance(self.pruning, WeightPruning) else self.pruning.selection

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which entries stay, of single weights."""
        pruning = self.pruning
        return pruning.masks if isinstance(pruning, WeightPruning | JointPruning) else {}

    @property
    def _structure(self) -> StructuredPruning | LearnedPruning | None:
        """The part of heads and neurons."""
        pruning = self.pruning
        if isinstance(pruning, WeightPruning):
            return None
        return pruning.structure if isinstance(pruning, JointPruning) else pruning

    @property
    def _weights(self) -> WeightPruning | None:
        """The part of single weights."""
        pruning = self.pruning
        if isinstance(pruning, JointPruning):
            return pruning.weights
        return pruning if isinstance(pruning, WeightPruning) else None

    @property
    def deciding(self) -> bool:
        """Whether something is left to decide."""
        return self.reached < 1 and not self.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach gates, all open, or as they were when training was broken off."""
        _check_arguments(args, self.stage)
        note_part(state, self.part)
        self._start(kwargs["model"])
        if state.global_step > 0:
            self._resume(checkpoint_of(args, state, self.resume_from), state.max_steps)
        self.interrupt.arm()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw gates that are random; remember the weights where masks begin to close."""
        first, _ = bounds(self.schedule, state.max_steps)
        if self.schedule.rewind and state.global_step == first:
            self.early = snapshot(kwargs["model"])
        self.pruning.before_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the gradients while they are there, as long as something is left to decide."""
        if self.deciding:
            self.pruning.observe()
        mask_gradients_(kwargs.get("optimizer"), kwargs["model"], self.masks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold what is masked."""
        self.pruning.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, where the schedule says so; stop, where a signal says so."""
        step, steps, epochs = state.global_step, state.max_steps, state.num_train_epochs
        if self.deciding and is_due(self.schedule, step, steps, epochs):
            self._decide(share(self.schedule, step, steps), state, kwargs)
        if self.interrupt.agreed():
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go back to the last plan that was good enough, where the metric says so."""
        if self.schedule.stop_metric is not None and not self.stopped:
            self._judge(kwargs["metrics"], state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add what is left of the model."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            found = self.figures()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what is known beside the checkpoint, once all processes have written theirs."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self._save(checkpoint_of(args, state, None), state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal, end here: the checkpoint is written, and nothing is removed."""
        if self.interrupt.requested:
            self.interrupt.disarm()
            raise KeyboardInterrupt(f"stopped and saved at step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Really remove what the gates have closed."""
        self.interrupt.disarm()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._resume(Path(state.best_model_checkpoint), state.max_steps)
        if self.deciding:
            self._decide(1.0, state, kwargs)
        self._finish(kwargs["model"], kwargs.get("optimizer"))

    def _start(self, model: Any) -> None:
        self._reset()
        if self._structure is not None:
            sites = find_sites(model, self.stage.units, self.stage.ignore)
            self.seen = site_lengths(model, sites, self.stage.sequence_length)
        self.pruning.start(model)
        self.parameters = count_parameters(model)

    def _decide(self, fraction: float, state: Any, kwargs: Mapping[str, Any]) -> None:
        self.pruning.decide(fraction)
        mask_states_(kwargs.get("optimizer"), kwargs["model"], self.masks)
        self.reached = fraction
        logger.info("%.4f of what is asked, kept %s", fraction, self.pruning.kept())
        if fraction < 1:
            return
        self.pruning.settle()
        if self.schedule.rewind and self.early:
            restore_(kwargs["model"], self.early)
            self.pruning.after_step()
            self.early = {}
        _forget_best(state)
        for line in self.selection.shortfalls() if self.selection is not None else ():
            logger.warning(line)

    def _judge(self, metrics: Mapping[str, float], state: Any) -> None:
        name = f"eval_{self.schedule.stop_metric}"
        if name not in metrics:
            raise ConfigError(
                f"stop_metric: evaluation gives no {name!r}, only {', '.join(sorted(metrics))}."
            )
        assert self.schedule.stop_below is not None  # noqa: S101  # checked by the recipe
        if metrics[name] >= self.schedule.stop_below:
            self.good = (self.reached, self.selection)
            return
        assert self._structure is not None  # noqa: S101  # checked by the recipe
        self.reached, selection = self.good
        self._structure.take(selection)
        self.pruning.settle()
        self.stopped = True
        _forget_best(state)
        logger.warning(
            "%s=%.4f is below %.4f: back to the last good plan, %s",
            name,
            metrics[name],
            self.schedule.stop_below,
            self.pruning.kept(),
        )

    def _finish(self, model: Any, optimizer: Any) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.pruning.finish()
        sites = {} if self.selection is None else self.selection.plan.sites
        kind = model.config.model_type if isinstance(model, PreTrainedModel) else ""
        plan = Plan(kind, sites)
        entries = []
        if self.selection is not None:
            entries.append({"kind": "structure", **self.selection.to_dict()})
        if self._weights is not None:
            entry = self._weights.entry()
            dead = self._weights.remove_dead()
            plan = plan.then(dead)
            entry["dead_units"] = sum(len(site.removed) for site in dead.sites.values())
            entries.append(entry)
        self.entries = [{**entry, "gradual": True} for entry in entries]
        self.plan = replace(plan, weights=count_kept(self.masks))
        if optimizer is not None:
            rebind_optimizer_(optimizer, names, model)

    def figures(self) -> dict[str, float]:
        """What is left now, for logs: sparsity, units by kind, parameters, MACs of units."""
        result = {f"prune/kept_{kind}": float(n) for kind, n in self.pruning.kept().items()}
        if len(self.stages) > 1 or self._structure is None:
            single = self.stages[-1].fraction * self.reached
            result["prune/sparsity_of_weights"] = result["prune/sparsity"] = single
        pruning, selection = self._structure, self.selection
        if pruning is None:
            return result
        gone, macs = 0, 0
        for site in pruning.sites:
            removed = len(selection.plan.sites[site.name].removed) if selection else 0
            gone += removed * site.parameters
            cost = unit_cost(site, "macs", self.seen)
            macs += (site.units - removed) * cost
        left = self.parameters - gone, macs
        if isinstance(pruning, LearnedPruning) and pruning.left is not None:
            left = pruning.left
        result["prune/parameters"], result["prune/macs"] = map(float, left)
        if isinstance(pruning, LearnedPruning):
            result["prune/sparsity"] = pruning.sparsity
            result["prune/asked"] = pruning.target * pruning.share
        else:
            outcome = selection.outcomes[0] if selection else None
            result["prune/sparsity"] = outcome.removed / outcome.total if outcome else 0.0
        return result

    def _fingerprint(self, max_steps: int) -> str:
        text = json.dumps([[s.model_dump(mode="json") for s in self.stages], self.seed, max_steps])
        return hashlib.sha256(text.encode()).hexdigest()

    def _save(self, checkpoint: Path, state: Any) -> None:
        data, tensors = self.pruning.state()
        reached, selection = self.good
        whole = {
            "recipe": self._fingerprint(state.max_steps),
            "reached": self.reached,
            "stopped": self.stopped,
            "good": {"reached": reached, "selection": selection_to_dict(selection)},
            "pruning": data,
        }
        early = {f"{PREFIX}{name}": value for name, value in self.early.items()}
        write_state(checkpoint, self.part, whole, {**tensors, **early}, parts_of(state))

    def _resume(self, checkpoint: Path, max_steps: int) -> None:
        whole, tensors = read_state(checkpoint, self.part)
        if whole["recipe"] != self._fingerprint(max_steps):
            raise CheckpointError(
                f"{checkpoint} was written with another prune stage, seed or number of steps: "
                "resume with the same recipe and arguments, or start anew."
            )
        self.pruning.load(whole["pruning"], tensors)
        self.reached, self.stopped = float(whole["reached"]), bool(whole["stopped"])
        good = whole["good"]
        self.good = (float(good["reached"]), selection_from_dict(good["selection"]))
        self.early = {
            name.removeprefix(PREFIX): value
            for name, value in tensors.items()
            if name.startswith(PREFIX)
        }


def _forget_best(state: Any) -> None:
    """Let the models from here on compete among themselves for the best."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None

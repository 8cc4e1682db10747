"""The prune stages of a recipe: checked, given their calibration data, done in their order."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel

from hf_prune.budget.prepare import check_solver
from hf_prune.criteria import get_criterion, needs
from hf_prune.errors import ConfigError
from hf_prune.oneshot import analyse, prune_once
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, Recipe, load_recipe
from hf_prune.search.experience import Experience
from hf_prune.search.trials import Metric
from hf_prune.sites import HIDDEN, find_sites
from hf_prune.split import Aim, prune_jointly, prune_weights
from hf_prune.statistics.batches import Batch, check_enough, main_input, take
from hf_prune.statistics.example import tokens_up_to
from hf_prune.statistics.score import check_projections, check_weights
from hf_prune.training.polish import with_judges
from hf_prune.weights.masks import Masks
from hf_prune.weights.progress import check_alone
from hf_prune.weights.stage import check_weight_stage, needs_data, walks


def check_stages(recipe: Recipe) -> None:
    """Refuse names that nobody knows, before any work.

    Raises:
        ConfigError: for an unknown criterion or solver, or a recipe that prunes nothing.
    """
    if not recipe.prune_stages and recipe.vocabulary is None:
        raise ConfigError("the recipe has no prune stage: there is nothing to do.")
    for stage in recipe.prune_stages:
        if stage.structural:
            check_projections(stage)
            check_solver(stage)
        if stage.joint:
            check_weight_stage(stage.weights_part(0.0))
        elif not stage.structural:
            check_weight_stage(stage)


def _needs_data(stage: Prune) -> bool:
    if stage.joint:  # at least to judge by
        return True
    if not stage.structural:
        return needs_data(stage)
    statistics = set(needs(get_criterion(stage.criterion))) - {"generator"}
    fits = stage.reconstruct or stage.rescale
    return bool(statistics) or fits or stage.search_trials + stage.polish_steps > 0


def _keeps_layers(stage: Prune) -> bool:
    return not stage.structural and walks(stage)


def calibration_batches(
    model: PreTrainedModel, recipe: Recipe, batches: Iterable[Batch] | None
) -> list[dict[str, Any]]:
    """What the prune stages read of the batches: as many examples as the one that reads most.

    Raises:
        DataError: when there are none, or too few, or their tokens are not of the model.
    """
    stages = [stage for stage in recipe.prune_stages if _needs_data(stage)]
    if not stages:
        return []
    return take(
        model,
        batches,
        at_least=max(stage.min_calibration_samples for stage in stages),
        at_most=max(
            max(stage.calibration_samples, stage.reconstruction_samples or 0) for stage in stages
        ),
    )


def checked_recipe(
    model: PreTrainedModel, recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]"
) -> Recipe:
    """A recipe, refused if it or the model cannot be pruned, and fitted to the model.

    Raises:
        ConfigError: when the recipe is not valid.
        NumericsError: when a weight is not finite.
        UnsupportedModelError: for an unknown family or a wrapped model.
    """
    loaded = load_recipe(recipe)
    check_stages(loaded)
    find_sites(model)
    check_weights(model)
    return _fitting(model, loaded)


def _fitting(model: PreTrainedModel, recipe: Recipe) -> Recipe:
    """A length that no stage names is no more than the positions of the model.

    Where a plain config says all widths, dead units stay, which differ from layer to layer.
    """
    stages = list(recipe.stages)
    for index, stage in enumerate(stages):
        if not isinstance(stage, Prune):
            continue
        changes: dict[str, Any] = {}
        length = tokens_up_to(model, stage.sequence_length)
        if "sequence_length" not in stage.model_fields_set and length < stage.sequence_length:
            changes["sequence_length"] = length
        fitting = stage.model_copy(update=changes)
        stages[index] = fitting.keeping_dead() if recipe.portable else fitting
    return recipe.model_copy(update={"stages": tuple(stages)})


def with_judges_apart(
    model: PreTrainedModel, stages: Sequence[Prune], batches: Sequence[Batch]
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Batches for all stages, and those that judge every polish, where there is one."""
    if not any(stage.polish_steps for stage in stages):
        return batches, ()
    fitted, judges = with_judges(model, batches)
    counts = gather_object([sum(len(main_input(model, batch)) for batch in fitted)])
    check_enough(sum(counts), max(stage.min_calibration_samples for stage in stages))
    return fitted, judges


@dataclass(frozen=True)
class Aids:
    """What helps a search above a floor, and where finished layers of single weights are kept."""

    metric: Metric | None = None
    experience: "str | os.PathLike[str] | None" = None
    progress: "str | os.PathLike[str] | None" = None

    def check(self, recipe: Recipe) -> None:
        """Refuse what no stage would use."""
        stages = recipe.prune_stages
        floors = any(stage.floor is not None for stage in stages)
        if not floors and (self.metric is not None or self.experience is not None):
            raise ConfigError(
                "metric and experience are for a stage with a floor: leave them out, or write "
                "floor: {drop: 0.01}."
            )
        if self.progress is None:
            return
        if not any(map(_keeps_layers, stages)):
            raise ConfigError(
                "progress keeps layers of a stage of single weights, units: [weights], that runs "
                "them, and there is none: leave it out."
            )
        check_alone()

    def folder(self, index: int, stage: Prune) -> Path | None:
        """Where the layers of one prune stage are kept."""
        if self.progress is None or not _keeps_layers(stage):
            return None
        return Path(self.progress) / f"stage-{index}"

    def store(self) -> Experience | None:
        """Past searches, if they are kept."""
        return None if self.experience is None else Experience(os.fspath(self.experience))


def prune_in_order(
    model: PreTrainedModel,
    given: PreTrainedModel,
    recipe: Recipe,
    batches: Sequence[Batch],
    report: dict[str, Any],
    aids: Aids,
) -> tuple[PreTrainedModel, Plan, Masks]:
    """One stage after the other. Re-fits aim at `model`, as long as widths allow it."""
    pruned = aim = model
    plan, masks, store = Plan(model.config.model_type), Masks(), aids.store()
    batches, judges = with_judges_apart(model, recipe.prune_stages, batches)
    for index, stage in enumerate(recipe.prune_stages):
        if stage.joint:
            both = prune_jointly(pruned, stage, batches, recipe.seed, aim=Aim(aim, judges))
            pruned, step, masks, entries = both.model, both.plan, both.masks, both.entries
        elif stage.structural:
            narrows = HIDDEN in stage.units
            goal = pruned if narrows else aim
            analysis = analyse(
                pruned, stage, batches, recipe.seed, dense=goal, given=given, judges=judges
            )
            done = prune_once(analysis, stage, aids.metric, store)
            pruned, step, entries = done.model, done.decision.selection.plan, [done.entry]
            aim = copy.deepcopy(pruned) if narrows else aim
        else:
            pruned = copy.deepcopy(model) if pruned is model else pruned
            step, masks, entry = prune_weights(
                pruned,
                stage,
                batches,
                recipe.seed,
                masks,
                Aim(aim, judges),
                aids.folder(index, stage),
            )
            entries = [entry]
        plan = plan.then(step)
        report["pruning"] += entries
    return pruned, plan, masks

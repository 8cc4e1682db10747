"""`compress`: recipe, model and data in; smaller model, plan and report out."""

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from hf_prune.budget.solvers import Selection, decide, get_solver
from hf_prune.criteria import get_criterion, needs
from hf_prune.errors import ConfigError
from hf_prune.measure.counts import count_encoder_parameters
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, Recipe, load_recipe
from hf_prune.report.result import Result, measure_stage, new_report
from hf_prune.sites import find_sites
from hf_prune.statistics.batches import Batch, take
from hf_prune.statistics.collect import collect
from hf_prune.statistics.score import check_weights, score
from hf_prune.surgery.reconstruct import reconstruct
from hf_prune.surgery.remove import remove_units
from hf_prune.training.structure import same_on_all_processes
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import (
    Masks,
    apply_masks_,
    check_weight_stage,
    count_kept,
    magnitude_masks,
)

logger = logging.getLogger(__name__)


def check_stages(recipe: Recipe) -> None:
    """Refuse names that nobody knows, before any work.

    Raises:
        ConfigError: for an unknown criterion or solver, or a recipe that prunes nothing.
    """
    if not recipe.prune_stages:
        raise ConfigError("the recipe has no prune stage: there is nothing to do.")
    for stage in recipe.prune_stages:
        if stage.structural:
            get_criterion(stage.criterion)
            get_solver(stage.solver)
        else:
            check_weight_stage(stage)


def _needs_data(stage: Prune) -> bool:
    if not stage.structural:
        return False
    statistics = set(needs(get_criterion(stage.criterion))) - {"generator"}
    return bool(statistics) or stage.reconstruct


def _calibration(
    model: PreTrainedModel, recipe: Recipe, batches: Iterable[Batch] | None
) -> list[dict[str, Any]]:
    stages = [stage for stage in recipe.prune_stages if _needs_data(stage)]
    if not stages:
        return []
    return take(
        model,
        batches,
        at_least=max(stage.min_calibration_samples for stage in stages),
        at_most=max(stage.calibration_samples for stage in stages),
    )


def decide_structure(
    model: PreTrainedModel, stage: Prune, batches: Sequence[Batch], seed: int
) -> Selection:
    """Find the sites, collect, score and select: the plan of one structured stage.

    Raises:
        DataError: when calibration data is missing or unfit.
        NumericsError: when a statistic or a score is not finite.
    """
    sites = find_sites(model, stage.units, stage.ignore)
    if not sites:
        raise ConfigError(
            f"no site is left to prune: ignore={list(stage.ignore)} matches all of them."
        )
    statistics = collect(model, sites, batches, needs(get_criterion(stage.criterion)), seed)
    scores = score(model, sites, stage.criterion, statistics, seed)
    layers = (stage.of, stage.cost) == ("layers", "parameters")
    base = count_encoder_parameters(model) if layers else None
    return decide(sites, scores, stage, model_type=model.config.model_type, base=base)


def _prune_structure(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    stage: Prune,
    batches: Sequence[Batch],
    seed: int,
) -> tuple[Plan, dict[str, Any]]:
    selection = same_on_all_processes(decide_structure(model, stage, batches, seed))
    remove_units(model, selection.plan)
    fitted = reconstruct(model, dense, batches, ridge=stage.ridge) if stage.reconstruct else []
    if not selection.met:
        logger.warning(
            "asked to remove %d %s, removed %d: floors and ignored sites hold the rest",
            selection.asked,
            selection.cost,
            selection.removed,
        )
    return selection.plan, {"kind": "structure", **selection.to_dict(), "refitted": len(fitted)}


def _prune_weights(model: PreTrainedModel, stage: Prune) -> tuple[Plan, Masks, dict[str, Any]]:
    weights = find_weights(model, stage.ignore)
    if not weights:
        raise ConfigError(f"no weight is left to prune: ignore={list(stage.ignore)} matches all.")
    masks = magnitude_masks(weights, stage.sparsity, stage.solver)
    apply_masks_(model, masks)
    kept = count_kept(masks)
    total = sum(mask.numel() for mask in masks.values())
    removed = total - sum(kept.values())
    entry = {"kind": "weights", "total": total, "removed": removed, "sparsity": removed / total}
    return Plan(model.config.model_type, weights=kept), masks, entry


def compress(
    model: PreTrainedModel,
    recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]",
    calibration: Iterable[Batch] | None = None,
) -> Result:
    """Prune a model in one shot: score, select, really remove, re-fit what is left.

    Train and distill stages of the recipe are left to a Trainer. A stage with a schedule is carried
    out at once, without it. The report lists both under `left_to_trainer`.

    Args:
        model: of a known family. It is not changed, so it can teach the result.
        recipe: a `Recipe`, the path of one, or its data.
        calibration: batches, dicts of tensors (`input_ids`, `attention_mask`, for some criteria
            `labels`). Read once, up to the recipe's `calibration_samples`. Under several processes,
            each passes its own share.

    Returns:
        The smaller model, the plan in the numbering of the given model, and a report with exact
        counts before and after. `save_result` writes it, `push_to_hub` shares it.

    Raises:
        ConfigError: when the recipe is not valid.
        DataError: when calibration data is missing, too short, or out of range.
        NumericsError: when a weight, a statistic or a score is not finite.
        UnsupportedModelError: for an unknown family or a wrapped model.
    """
    recipe = load_recipe(recipe)
    check_stages(recipe)
    find_sites(model)
    check_weights(model)
    batches = _calibration(model, recipe, calibration)
    length = max(stage.sequence_length for stage in recipe.prune_stages)
    report = new_report(recipe, model)
    report["sequence_length"] = length
    report["calibration_samples"] = sum(len(next(iter(batch.values()))) for batch in batches)
    report["left_to_trainer"] = [
        "schedule" if isinstance(stage, Prune) else stage.stage
        for stage in recipe.stages
        if not isinstance(stage, Prune) or stage.schedule
    ]
    report["stages"]["dense"] = measure_stage(model, length)
    pruned = copy.deepcopy(model)
    plan, masks = Plan(model.config.model_type), Masks()
    for stage in recipe.prune_stages:
        if stage.structural:
            step, entry = _prune_structure(pruned, model, stage, batches, recipe.seed)
        else:
            step, new_masks, entry = _prune_weights(pruned, stage)
            masks |= new_masks
        plan = plan.then(step)
        report["pruning"].append(entry)
    report["stages"]["pruned"] = measure_stage(pruned, length)
    return Result(pruned, plan, report, recipe, masks)

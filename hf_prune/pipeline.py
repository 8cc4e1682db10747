"""`compress`: recipe, model and data in; smaller model, plan and report out."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.budget.prepare import check_solver
from hf_prune.criteria import get_criterion, needs
from hf_prune.errors import ConfigError
from hf_prune.oneshot import Metric, analyse, prune_once
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, Recipe, Stage, Vocabulary, load_recipe
from hf_prune.report.result import Result, measure_stage, new_report
from hf_prune.search.experience import Experience
from hf_prune.sites import HIDDEN, find_sites
from hf_prune.split import Aim, prune_jointly, prune_weights
from hf_prune.statistics.batches import Batch, check_enough, main_input, take
from hf_prune.statistics.example import tokens_up_to
from hf_prune.statistics.score import check_projections, check_weights
from hf_prune.surgery.layers import moved_parameters, shorten_layers_
from hf_prune.surgery.plain import make_plain_
from hf_prune.surgery.vocabulary_stage import narrow_masks, prune_vocabulary_stage, texts_of
from hf_prune.training.polish import with_judges
from hf_prune.weights.masks import Masks
from hf_prune.weights.progress import check_alone
from hf_prune.weights.stage import check_weight_stage, needs_data, walks

LENGTH = 32
"""Tokens of the sequence whose MACs are counted where no stage says it."""


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
        at_most=max(
            max(stage.calibration_samples, stage.reconstruction_samples or 0) for stage in stages
        ),
    )


def _check(
    model: PreTrainedModel, recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]"
) -> Recipe:
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
        if recipe.portable and "weights" in stage.units:
            changes["weights"] = stage.single.model_copy(update={"remove_dead": False})
        stages[index] = stage.model_copy(update=changes)
    return recipe.model_copy(update={"stages": tuple(stages)})


def _left(stage: Stage) -> list[str]:
    """What of a stage needs training: all of it, or its schedule and its coarse gates."""
    if isinstance(stage, Prune):
        return [name for name in ("schedule", "coarse") if getattr(stage, name)]
    return [] if isinstance(stage, Vocabulary) else [stage.stage]


def _start_report(
    model: PreTrainedModel, recipe: Recipe, batches: Sequence[Batch]
) -> dict[str, Any]:
    lengths = [stage.sequence_length for stage in recipe.prune_stages]
    length = max(lengths, default=tokens_up_to(model, LENGTH))
    report = new_report(recipe, model)
    report["sequence_length"] = length
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    report["calibration_samples"] = sum(gather_object([samples]))
    report["left_to_trainer"] = [name for stage in recipe.stages for name in _left(stage)]
    report["stages"]["dense"] = measure_stage(model, length)
    return report


def _judged(
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
class _Aids:
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


def _all_stages(
    model: PreTrainedModel,
    given: PreTrainedModel,
    recipe: Recipe,
    batches: Sequence[Batch],
    report: dict[str, Any],
    aids: _Aids,
) -> tuple[PreTrainedModel, Plan, Masks]:
    """One stage after the other. Re-fits aim at `model`, as long as widths allow it."""
    pruned = aim = model
    plan, masks, store = Plan(model.config.model_type), Masks(), aids.store()
    batches, judges = _judged(model, recipe.prune_stages, batches)
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


Words = tuple[PreTrainedTokenizerBase, Vocabulary, Iterable[str]]
"""What a stage of the vocabulary works with."""


def _words(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, texts: Iterable[str] | None
) -> Words | None:
    """Tokenizer, stage and texts, where the recipe prunes the vocabulary."""
    if recipe.vocabulary is None:
        return None
    if tokenizer is None:
        raise ConfigError("the recipe prunes the vocabulary: pass the tokenizer of the model.")
    return tokenizer, recipe.vocabulary, texts_of(recipe.vocabulary, texts)


def _finish(result: Result, given: PreTrainedModel, words: Words | None) -> None:
    """What comes after all other stages: layers, a plain config, the vocabulary, figures."""
    report = result.report
    if result.model is given:  # nothing but the vocabulary is pruned
        result.model = copy.deepcopy(given)
    result.layers = shorten_layers_(result.model)
    result.masks = moved_parameters(result.model, result.masks, result.layers)
    if result.recipe.portable:
        make_plain_(result.model)
    if words is not None:
        left, entry = prune_vocabulary_stage(result.model, *words)
        result.tokenizer = left.tokenizer
        result.masks = narrow_masks(result.model, result.masks, left.kept)
        report["pruning"].append(entry)
    report["stages"]["pruned"] = measure_stage(result.model, report["sequence_length"])


def compress(  # noqa: PLR0913  # all but three by name, and each stands alone
    model: PreTrainedModel,
    recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]",
    calibration: Iterable[Batch] | None = None,
    *,
    metric: Metric | None = None,
    experience: "str | os.PathLike[str] | None" = None,
    progress: "str | os.PathLike[str] | None" = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Iterable[str] | None = None,
) -> Result:
    """Prune a model in one shot: score, select, really remove, re-fit what is left.

    Train and distill stages of the recipe are left to a Trainer. A stage with a schedule is carried
    out at once, without it and without coarse gates. The report lists all of this under
    `left_to_trainer`.

    Args:
        model: of a known family. It is not changed, so it can teach the result.
        recipe: a `Recipe`, the path of one, or its data.
        calibration: batches, dicts of tensors (`input_ids`, `attention_mask`, for some criteria
            `labels`). Read once, up to the recipe's `calibration_samples`. Under several processes,
            each passes its own share.
        metric: from a model to a number, higher = better; for stages with a `floor`.
        experience: a local file of past searches above a floor, made when it is not there. The
            search starts where that of the most similar model of the same family ended.
        progress: a folder in which finished layers of stages of single weights alone are kept: a
            run that was broken off goes on there when it is started again. Stages before them
            run anew; where one of them was timed and now chooses other widths, the folder is of
            another run.
        tokenizer: of the model; the result has it. A stage `vocabulary` needs it, and the result
            then has a smaller one.
        texts: what the model is to be used for, where such a stage names no file of them.

    Returns:
        The smaller model, the plan in the numbering of the given model, and a report with exact
        counts before and after. `save_result` writes it, `push_to_hub` shares it.

    Raises:
        CheckpointError: when the file of experience is torn, or is somebody else's, or `progress`
            is of another run.
        ConfigError: when the recipe is not valid, has no floor for a metric or experience, or no
            stage that keeps progress.
        DataError: when calibration data is missing, too short, or out of range.
        NumericsError: when a weight, a statistic or a score is not finite.
        UnsupportedModelError: for an unknown family or a wrapped model.
    """
    recipe = _check(model, recipe)
    words = _words(recipe, tokenizer, texts)
    result = _pruned(model, model, recipe, calibration, _Aids(metric, experience, progress))
    result.tokenizer = tokenizer
    _finish(result, model, words)
    return result


def prune_further(
    model: PreTrainedModel,
    given: PreTrainedModel,
    recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]",
    calibration: Iterable[Batch] | None = None,
    *,
    metric: Metric | None = None,
    experience: "str | os.PathLike[str] | None" = None,
) -> Result:
    """`compress` of a model that earlier stages, and training between them, made of another one.

    Args:
        model: as in `compress`; re-fits aim at it.
        given: what it was made of: targets are shares of it, and a floor is measured from it.
        recipe: as in `compress`, without a stage of the vocabulary.
        calibration: as in `compress`.
        metric: as in `compress`.
        experience: as in `compress`.

    Raises:
        CheckpointError: as in `compress`.
        ConfigError: as in `compress`.
        DataError: as in `compress`.
        NumericsError: as in `compress`.
        UnsupportedModelError: as in `compress`.
    """
    recipe = _check(model, recipe)
    result = _pruned(model, given, recipe, calibration, _Aids(metric, experience))
    _finish(result, model, None)
    return result


def _pruned(
    model: PreTrainedModel,
    given: PreTrainedModel,
    recipe: Recipe,
    calibration: Iterable[Batch] | None,
    aids: _Aids,
) -> Result:
    """What the prune stages of a recipe make of a model."""
    aids.check(recipe)
    batches = _calibration(model, recipe, calibration)
    report = _start_report(model, recipe, batches)
    pruned, plan, masks = _all_stages(model, given, recipe, batches, report, aids)
    return Result(pruned, plan, report, recipe, masks)


def compress_family(
    model: PreTrainedModel,
    recipe: "Recipe | str | os.PathLike[str] | Mapping[str, Any]",
    calibration: Iterable[Batch] | None = None,
    *,
    targets: Sequence["float | Mapping[str, Any]"],
) -> list[Result]:
    """Several sizes of a model from one calibration: statistics and rankings are computed once.

    Args:
        model: as in `compress`.
        recipe: as in `compress`, with exactly one prune stage, of heads and neurons. Its own
            sparsity or target is not used.
        calibration: as in `compress`.
        targets: for each result a sparsity, or a target such as `{"speedup": "3x"}`.

    Returns:
        One result for each target, in their order. Each is what `compress` gives for it.

    Raises:
        ConfigError: when the recipe has another number of prune stages, there is no target, or one
            is not valid.
        DataError: as in `compress`.
        NumericsError: as in `compress`.
        UnsupportedModelError: as in `compress`.
    """
    recipe = _check(model, recipe)
    stages = recipe.prune_stages
    if len(stages) != 1 or "weights" in stages[0].units:
        raise ConfigError("a family of models needs a recipe with one prune stage, not of weights.")
    if stages[0].floor is not None:
        raise ConfigError("a family has the sizes that are asked for: a floor is for compress().")
    if recipe.vocabulary is not None:
        raise ConfigError(
            "a family shares one vocabulary: leave the stage out, prune it afterwards."
        )
    if not len(targets):
        raise ConfigError("a family has no size: pass targets=[0.5, {'speedup': '3x'}], or others.")
    stages = tuple(_with_target(stages[0], target) for target in targets)
    batches = _calibration(model, recipe, calibration)
    report = _start_report(model, recipe, batches)
    fitted, judges = _judged(model, stages, batches)
    analysis = analyse(model, stages[0], fitted, recipe.seed, judges=judges)
    results = []
    for stage in stages:
        one = recipe.model_copy(update={"stages": (stage,)})
        done = prune_once(analysis, stage)
        own = copy.deepcopy(report)
        own["recipe"] = one.model_dump(mode="json")
        own["pruning"].append(done.entry)
        layers = shorten_layers_(done.model)
        if one.portable:
            make_plain_(done.model)
        own["stages"]["pruned"] = measure_stage(done.model, report["sequence_length"])
        plan = Plan(model.config.model_type).then(done.decision.selection.plan)
        results.append(Result(done.model, plan, own, one, layers=layers))
    return results


def _with_target(stage: Prune, target: "float | Mapping[str, Any]") -> Prune:
    data = stage.model_dump(mode="json", exclude_none=True)
    data = {key: value for key, value in data.items() if key not in ("sparsity", "target")}
    key = "target" if isinstance(target, Mapping) else "sparsity"
    value = dict(target) if isinstance(target, Mapping) else float(target)
    (made,) = load_recipe({"stages": [{**data, key: value}]}).prune_stages
    return made

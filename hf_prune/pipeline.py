"""`compress`: recipe, model and data in; smaller model, plan and report out."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.errors import ConfigError
from hf_prune.oneshot import analyse, prune_once
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, Recipe, Stage, Vocabulary, load_recipe
from hf_prune.report.result import Result, measure_stage, new_report
from hf_prune.search.trials import Metric
from hf_prune.stages import (
    Aids,
    calibration_batches,
    checked_recipe,
    prune_in_order,
    with_judges_apart,
)
from hf_prune.statistics.batches import Batch
from hf_prune.statistics.example import tokens_up_to
from hf_prune.surgery.layers import moved_parameters, shorten_layers_
from hf_prune.surgery.plain import make_plain_
from hf_prune.surgery.vocabulary_stage import narrow_masks, prune_vocabulary_stage, texts_of

LENGTH = 32
"""Tokens of the sequence whose MACs are counted where no stage says it."""


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
    recipe = checked_recipe(model, recipe)
    words = _words(recipe, tokenizer, texts)
    result = _pruned(model, model, recipe, calibration, Aids(metric, experience, progress))
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
    recipe = checked_recipe(model, recipe)
    result = _pruned(model, given, recipe, calibration, Aids(metric, experience))
    _finish(result, model, None)
    return result


def _pruned(
    model: PreTrainedModel,
    given: PreTrainedModel,
    recipe: Recipe,
    calibration: Iterable[Batch] | None,
    aids: Aids,
) -> Result:
    """What the prune stages of a recipe make of a model."""
    aids.check(recipe)
    batches = calibration_batches(model, recipe, calibration)
    report = _start_report(model, recipe, batches)
    pruned, plan, masks = prune_in_order(model, given, recipe, batches, report, aids)
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
    recipe = checked_recipe(model, recipe)
    stages = recipe.prune_stages
    if len(stages) != 1 or "weights" in stages[0].units:
        raise ConfigError("a family of models needs a recipe with one prune stage, not of weights.")
    if stages[0].floor is not None:
        raise ConfigError("a family has the sizes that are asked for: a floor is for compress().")
    if recipe.vocabulary is not None:
        raise ConfigError(
            "a family shares one vocabulary: leave the stage out, prune it afterwards."
        )
    if not len(targets) or isinstance(targets, str | Mapping):
        raise ConfigError("a family has no size: pass targets=[0.5, {'speedup': '3x'}], or others.")
    stages = tuple(_with_target(stages[0], target) for target in targets)
    batches = calibration_batches(model, recipe, calibration)
    report = _start_report(model, recipe, batches)
    fitted, judges = with_judges_apart(model, stages, batches)
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
    if isinstance(target, Mapping):
        goal: dict[str, Any] = {"target": dict(target)}
    elif isinstance(target, int | float) and not isinstance(target, bool):
        goal = {"sparsity": float(target)}
    else:
        raise ConfigError(
            f"targets: {target!r} is neither a sparsity such as 0.5 nor a target such as "
            "{'speedup': '3x'}."
        )
    (made,) = load_recipe({"stages": [{**data, **goal}]}).prune_stages
    return made

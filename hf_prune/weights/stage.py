"""One stage of single weights, as a recipe says it."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hf_prune.errors import ConfigError, DataError, NumericsError
from hf_prune.recipe import Prune, count_to_remove, did_you_mean, explain
from hf_prune.statistics.ridge import generates, ridge_of
from hf_prune.weights.budgets import BUDGETS, OUTLIER_RANGE, Removed, allot
from hf_prune.weights.find import Matrix, find_matrices
from hf_prune.weights.gradients import gradient_scores
from hf_prune.weights.patterns import Pattern, parse_pattern
from hf_prune.weights.problem import CRITERIA, DATA_FREE, GRADIENTS, Options, data_free_scores
from hf_prune.weights.progress import Progress, check_alone, digest_of
from hf_prune.weights.prune import Pruned, prune_weights_
from hf_prune.weights.rows import check_followed
from hf_prune.weights.solvers import SOLVERS
from hf_prune.weights.walk import Inputs

MEASURED = ("outliers", "knapsack")
"""Solvers that read calibration batches."""
BY_SIZE = ("magnitude_sigma", "magnitude")
"""Criteria that rank a matrix by the sizes of its weights."""


def check_weight_stage(stage: Prune) -> None:
    """Refuse what single weights do not have, before any work.

    Raises:
        ConfigError: for an unknown criterion or solver, with the closest name and all the names
            there are, or for two that do not go together.
    """
    for kind, name, known in (
        ("criterion", stage.criterion, CRITERIA),
        ("solver", stage.solver, BUDGETS),
    ):
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r} for weights{did_you_mean(name, known)}")
    _check_nothing_ignored(stage)
    if stage.single.threshold_std is not None and stage.criterion not in BY_SIZE:
        raise ConfigError(
            f"threshold_std is of sizes, and criterion {stage.criterion!r} ranks by something "
            f"else: write criterion: {BY_SIZE[0]}."
        )
    pattern = parse_pattern(stage.single.pattern)
    if pattern.kind == "n:m" and stage.solver == "global":
        raise ConfigError(
            f"pattern {pattern} ranks neighbours, and solver 'global' all weights. Use uniform, or "
            "outliers or knapsack, with which matrices differ in how many of "
            f"{pattern.second} stay."
        )
    _check_levels(stage, pattern)
    if stage.solver == "global" and stage.single.rank == "row":
        raise ConfigError("solver 'global' is one ranking of all matrices: leave rank: row out.")
    if stage.solver == "global" and stage.criterion not in (*DATA_FREE, *GRADIENTS):
        raise ConfigError(
            f"criterion {stage.criterion!r} compares weights within a matrix only, so that solver "
            "'global' has no common unit. Use uniform, outliers or knapsack."
        )


def _check_levels(stage: Prune, pattern: Pattern) -> None:
    """Refuse budgets that could give every matrix only the same n of `n:m`."""
    if pattern.kind != "n:m" or stage.solver not in MEASURED:
        return
    if pattern.first == 1:
        raise ConfigError(
            f"pattern {pattern}: no matrix can keep less, so that none can keep more. Use "
            f"solver: uniform, or 2:{2 * pattern.second}."
        )
    if stage.solver == "outliers" and pattern.second * OUTLIER_RANGE < 0.5:
        raise ConfigError(
            f"solver 'outliers' moves sparsities by {OUTLIER_RANGE:g} at most, which is less than "
            f"half a step of {pattern}: use knapsack, or n of 8 and more."
        )


def _check_nothing_ignored(stage: Prune) -> None:
    """Refuse `projections` and `ridge` where nothing reads them."""
    if stage.projections > 1 and stage.criterion != "fisher_diagonal":
        raise ConfigError(
            f"projections={stage.projections}: criterion {stage.criterion!r} draws none, and they "
            "would be ignored. Leave them out, or use fisher_diagonal."
        )
    fits = stage.reconstruct or stage.single.dense_target or stage.solver == "knapsack"
    if stage.ridge is not None and not fits and stage.criterion in (*DATA_FREE, *GRADIENTS):
        raise ConfigError(
            f"ridge={stage.ridge:g}: nothing is fitted with reconstruct: false, weights: "
            "{dense_target: false}, and it would be ignored. Leave it out, or one of these."
        )


def walks(stage: Prune) -> bool:
    """Whether a stage of single weights runs the layers that it prunes."""
    return stage.criterion in SOLVERS or stage.reconstruct or stage.single.dense_target


def needs_data(stage: Prune) -> bool:
    """Whether a stage of single weights reads calibration batches."""
    reads = stage.criterion in GRADIENTS or stage.solver in MEASURED
    return walks(stage) or reads or stage.polish_steps > 0


def _pattern(model: nn.Module, stage: Prune) -> Pattern:
    """With `rank: auto` in rows of models that generate, but for one ranking, or a threshold."""
    rank = stage.single.rank
    whole = stage.solver == "global" or stage.single.threshold_std is not None
    in_rows = generates(model) and not whole
    return parse_pattern(stage.single.pattern, rows=rank == "row" or (rank == "auto" and in_rows))


def options_of(model: nn.Module, stage: Prune, seed: int, scores: Mapping[str, Tensor]) -> Options:
    """How a stage prunes every matrix of a model."""
    return Options(
        criterion=stage.criterion,
        pattern=_pattern(model, stage),
        dense_target=stage.single.dense_target,
        refit_steps=stage.single.refit_steps if stage.reconstruct else 0,
        ridge=ridge_of(model, stage),
        iterations=stage.single.iterations,
        penalty=stage.single.penalty,
        seed=seed,
        scores=scores,
    )


def find_stage(model: nn.Module, stage: Prune) -> list[Matrix]:
    """The matrices that a stage prunes.

    Raises:
        ConfigError: when there is none.
    """
    single = stage.single
    matrices = find_matrices(
        model, targets=single.targets, ignore=stage.ignore, embeddings=single.embeddings
    )
    if not matrices:
        raise ConfigError(f"no weight is left to prune: ignore={list(stage.ignore)} matches all.")
    return matrices


def _below(matrices: Sequence[Matrix], threshold: float) -> Removed:
    """How many entries of each matrix are smaller than so many of its standard deviations."""
    result = Removed()
    for matrix in matrices:
        counts = []
        for group, weight in enumerate(matrix.view(matrix.parameter.detach())):
            sizes = data_free_scores("magnitude_sigma", matrix.name, group, weight, 0)
            counts.append(int((sizes < threshold).sum()))
            if counts[-1] == weight.numel():
                raise ConfigError(
                    f"threshold_std={threshold:g}: no weight of {matrix.name} is that large, so "
                    f"that nothing would stay; the largest has {float(sizes.max()):.3g} standard "
                    "deviations. Write less, or leave it out with ignore."
                )
        result[matrix.name] = counts
    return result


def _progress(
    folder: Path | None,
    module: nn.Module,
    stage: Prune,
    batches: Sequence[Inputs],
    seed: int,
) -> Progress | None:
    """Where finished layers are kept, and what the run is: module, stage, data and seed."""
    if folder is None:
        return None
    check_alone()
    return Progress(
        folder, digest_of([stage.model_dump_json(), seed, module.state_dict(), *batches])
    )


def prune_stage_(
    model: nn.Module,
    stage: Prune,
    batches: Sequence[Inputs],
    seed: int,
    *,
    progress: Path | None = None,
    earlier: Mapping[str, Tensor] | None = None,
) -> tuple[Pruned, dict[str, Any]]:
    """Prune single weights of any module in place, as a stage says.

    Args:
        model: any `nn.Module`.
        stage: of `units: [weights]`.
        batches: calibration inputs, where the stage needs them.
        seed: of everything random.
        progress: a folder in which finished layers are kept, so that an interrupted run goes on.
        earlier: masks of earlier stages. Their zeros stay zeros, and count as removed.

    Returns:
        Masks and errors, and the entry for the report.

    Raises:
        ConfigError: when the stage names what there is not.
        DataError: when inputs are needed and there are none.
        UnsupportedModelError: when the inputs of packed experts are not known: nothing was changed.
    """
    check_weight_stage(stage)
    matrices = find_stage(model, stage)
    _check_finite(matrices)
    if options_of(model, stage, seed, {}).needs_inputs or stage.solver in MEASURED:
        check_followed(model, matrices)
    scores: dict[str, Tensor] = {}
    if stage.criterion in GRADIENTS:
        told = (stage.criterion, seed, stage.projections)
        scores = gradient_scores(model, matrices, batches, *told)
    options = options_of(model, stage, seed, scores)
    if stage.single.threshold_std is not None:
        removed = _below(matrices, stage.single.threshold_std)
    else:
        removed = allot(model, matrices, stage.solver, stage.fraction, options, batches)
    kept = _progress(progress, model, stage, batches, seed)
    result = prune_weights_(
        model, matrices, removed, options, batches, progress=kept, earlier=earlier
    )
    return result, _entry(stage, options, matrices, removed, result)


def _entry(
    stage: Prune,
    options: Options,
    matrices: Sequence[Matrix],
    removed: Removed,
    result: Pruned,
) -> dict[str, Any]:
    """What the report says of a stage."""
    total = sum(mask.numel() for mask in result.masks.values())
    gone = total - sum(int(mask.sum()) for mask in result.masks.values())
    asked = None
    if options.pattern.kind != "n:m" and stage.single.threshold_std is None:
        asked = count_to_remove(stage.fraction, total)
    entry: dict[str, Any] = {
        "kind": "weights",
        "criterion": stage.criterion,
        "pattern": str(options.pattern),
        "ranked_by": "row" if options.pattern.rows else "matrix",
        "total": total,
        "removed": gone,
        "sparsity": gone / total,
        "mean_relative_error": _mean(list(result.errors.values())),
    }
    if asked is not None:
        entry |= {"asked_to_remove": asked, "met": gone >= asked}
    if options.pattern.kind == "n:m" and stage.solver != "uniform":
        entry["kept_of_m"] = {
            m.name: options.pattern.at(removed[m.name][0], _shape(m)).first for m in matrices
        }
    return entry


def _shape(matrix: Matrix) -> tuple[int, int]:
    """`[R, C]` of each group."""
    _, rows, columns = matrix.view(matrix.parameter).shape
    return rows, columns


def sparsify_(
    module: nn.Module,
    batches: Iterable[Inputs] = (),
    *,
    seed: int = 0,
    progress: "str | os.PathLike[str] | None" = None,
    **fields: Any,
) -> Pruned:
    """Prune single weights of any `nn.Module` in place: a CNN, an LSTM, a model of transformers.

    Matrices of linear layers, convolutions, recurrent layers and torch's attention are followed to
    their inputs, and what stays is re-fitted so that the module gives what it gave. Zeros that are
    in a module already are weights like others, and may become something else: `KeepZeros` and the
    later stages of `compress` know which zeros were chosen.

    Args:
        module: left in the mode that it was in. An error midway leaves it half pruned.
        batches: calibration inputs: tensors, tuples or lists of arguments, or dicts for
            transformers; a DataLoader of them, too. Not needed with `criterion="magnitude",
            reconstruct=False, weights={"dense_target": False}`.
        seed: of everything random.
        progress: a folder in which finished layers of a transformer are kept: a run that was
            broken off goes on there when the dense module is passed again.
        fields: of a recipe's stage `prune` with `units: [weights]`: `sparsity`,
            `weights={"pattern": "2:4"}` or `{"threshold_std": 0.5}`, `criterion`, `solver`,
            `ignore`.

    Returns:
        `masks` by parameter name, True where a weight stays: `KeepZeros(masks)` keeps zeros in a
        Trainer; the relative `errors` of the outputs of each matrix; and the layers `resumed`.

    Raises:
        CheckpointError: when `progress` is of another run.
        ConfigError: for fields that are unknown or do not go together.
        DataError: when inputs are needed and there are none, or they are not what the module takes.
        NumericsError: when weights or inputs are not finite.
        UnsupportedModelError: when calibration never runs one of the matrices, or the inputs of
            packed experts are not known.
    """
    stage = _own_stage(fields)
    if isinstance(batches, Mapping | Tensor):
        raise DataError("sparsify_ takes several batches: pass a list of them, [batch].")
    folder = None if progress is None else Path(progress)
    given = [_as_arguments(module, batch) for batch in batches]
    return prune_stage_(module, stage, given, seed, progress=folder)[0]


def _own_stage(fields: Mapping[str, Any]) -> Prune:
    """The stage of `sparsify_`.

    Raises:
        ConfigError: for fields that are unknown, do not go together, or are of other ways to prune.
    """
    if "units" in fields:
        raise ConfigError("sparsify_ prunes single weights: leave units out.")
    try:
        stage = Prune(units=("weights",), **_without_lists(fields))
    except ValidationError as error:
        raise ConfigError(f"sparsify_: {explain(error, Prune)}") from error
    if stage.model_fields_set & {"calibration_samples", "min_calibration_samples"}:
        raise ConfigError(
            "sparsify_ reads all batches that it is given: pass fewer, in the place of "
            "calibration_samples and min_calibration_samples."
        )
    if "sequence_length" in stage.model_fields_set:
        raise ConfigError("sparsify_ counts no MACs: leave sequence_length to compress().")
    if stage.single.remove_dead and "remove_dead" in stage.single.model_fields_set:
        raise ConfigError(
            "sparsify_ changes no shape of a module: leave remove_dead to compress()."
        )
    if stage.schedule is not None or stage.polish_steps:
        raise ConfigError(
            "sparsify_ prunes any module in one shot: leave schedule to PruneCallback, and "
            "polish_steps to compress()."
        )
    return stage


def _without_lists(value: Any) -> Any:
    """Fields as a recipe holds them: lists, as they stand in YAML, are tuples."""
    if isinstance(value, Mapping):
        return {name: _without_lists(item) for name, item in value.items()}
    return tuple(map(_without_lists, value)) if isinstance(value, list) else value


def _as_arguments(module: nn.Module, batch: Any) -> Any:
    """A batch as `call_model` takes it. Lists, which a DataLoader gives, are tuples of arguments.

    Raises:
        DataError: when the module takes other arguments, such as none for labels.
    """
    if not isinstance(batch, list | tuple):
        return batch
    try:
        inspect.signature(module.forward).bind(*batch)
    except TypeError as error:
        raise DataError(
            f"a batch has {len(batch)} values, which are not the arguments of "
            f"{type(module).__name__}.forward ({error}). Pass only what it takes, without labels: "
            "[x for x, _ in loader]."
        ) from error
    return tuple(batch)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _check_finite(matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        if not torch.isfinite(matrix.parameter).all():
            raise NumericsError(
                f"{matrix.name} has values that are not finite: nothing was changed."
            )

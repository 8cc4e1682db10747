"""Stages in which single weights become zero: alone, or in one budget with heads and neurons.

How much of a budget goes as units and how much as single weights is not known beforehand. A few
splits are built as they would be in the end, and judged on examples that nothing was fitted to.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_prune.budget.costs import cost_tables
from hf_prune.oneshot import Analysis, analyse, prune_once
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, count_to_remove
from hf_prune.search.judge import Judge
from hf_prune.statistics.batches import Batch, first_examples
from hf_prune.surgery.dead import remove_dead_
from hf_prune.training.polish import polish_
from hf_prune.weights.masks import Masks, count_kept
from hf_prune.weights.stage import find_stage, prune_stage_

logger = logging.getLogger(__name__)

SPLITS = 5
"""Splits that are tried where the stage does not say how many."""
FIRST = (0.0, 1.0, 0.5)
"""Shares of what is asked that are tried as units first."""
CLOSE = 1 / 64
"""Two splits that are as close are not told apart."""
MOST = 0.99
"""Of all units no more than this is asked to go."""


@dataclass(frozen=True)
class Aim:
    """The network that re-fits and a polish come near to, and the examples that judge a polish."""

    dense: PreTrainedModel
    judges: Sequence[Batch] = ()


def prune_weights(
    model: PreTrainedModel,
    stage: Prune,
    batches: Sequence[Batch],
    seed: int,
    masks: Masks,
    aim: Aim | None = None,
    progress: Path | None = None,
) -> tuple[Plan, Masks, dict[str, Any]]:
    """Carry out a stage of single weights on a model, in place.

    Args:
        model: of a known family.
        stage: of `units: [weights]`.
        batches: calibration batches, of which the stage's `calibration_samples` are read.
        seed: of everything random.
        masks: of earlier stages. Their zeros stay zeros, and count as removed.
        aim: of a polish, where the stage has one.
        progress: a folder in which finished layers are kept, so that an interrupted run goes on.

    Returns:
        What stays, the masks of all stages, and the entry for the report.

    Raises:
        DataError: when calibration data is missing.
        NumericsError: when weights or inputs are not finite.
    """
    batches = first_examples(model, batches, stage.calibration_samples)
    result, entry = prune_stage_(model, stage, batches, seed, progress=progress, earlier=masks)
    if progress is not None:
        entry["resumed"] = result.resumed
    if stage.polish_steps:
        assert aim is not None  # noqa: S101  # a stage with a polish has one
        data, steps = (batches, aim.judges), stage.polish_steps
        entry["polish"] = polish_(model, aim.dense, *data, steps=steps, ignore=stage.ignore)
    masks = {**masks, **result.masks}
    dead = Plan(model.config.model_type)
    if stage.single.removes_dead:
        dead, masks = remove_dead_(model, masks)
        entry["dead_units"] = sum(len(site.removed) for site in dead.sites.values())
    return Plan(model.config.model_type, dead.sites, count_kept(masks)), masks, entry


def try_splits(error: Callable[[float], float], trials: int) -> list[tuple[float, float]]:
    """Shares and their errors, in the order in which they were tried.

    The ends and the middle come first; then, again and again, the middle of the wider gap beside
    the best so far, which closes in on the least error where there is only one.

    Args:
        error: of a share in [0, 1].
        trials: shares to try, at least one.
    """
    tried: list[tuple[float, float]] = []
    for _ in range(trials):
        share = FIRST[len(tried)] if len(tried) < len(FIRST) else _between(tried)
        if share is None:
            break
        tried.append((share, error(share)))
    return tried


def _between(tried: Sequence[tuple[float, float]]) -> float | None:
    """The middle of the wider gap beside the best share; None where both are closed."""
    shares = sorted(share for share, _ in tried)
    at = shares.index(min(tried, key=lambda pair: pair[1])[0])
    gaps = [(shares[i], shares[i + 1]) for i in (at - 1, at) if 0 <= i < len(shares) - 1]
    low, high = max(gaps, key=lambda gap: gap[1] - gap[0])
    return (low + high) / 2 if high - low > CLOSE else None


@dataclass(frozen=True)
class Both:
    """A model of which units were removed and single weights zeroed, and how it came to be.

    Attributes:
        model: the result.
        plan: what stays.
        masks: of single weights, by parameter name; empty where units were enough.
        entries: for the report, as of a stage of units and one of weights.
    """

    model: PreTrainedModel
    plan: Plan
    masks: Masks = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Budget:
    """What a joint stage asks for, in entries of the matrices that single weights are in."""

    analysis: Analysis
    stage: Prune

    def __post_init__(self) -> None:
        assert self.stage.sparsity is not None  # noqa: S101  # a joint stage has one
        self.total = self._entries(self.analysis.model)
        self.asked = count_to_remove(self.stage.sparsity, self.total)
        tables = cost_tables(self.analysis.sites, "parameters", self.stage.sequence_length)
        self.units = sum(table[-1] for table in tables.values())

    def _entries(self, model: PreTrainedModel) -> int:
        """Entries of all matrices."""
        return sum(matrix.numel for matrix in find_stage(model, self.stage.weights_part(0.0)))

    def nonzero(self, model: PreTrainedModel) -> int:
        """Entries that are not zero."""
        matrices = find_stage(model, self.stage.weights_part(0.0))
        return sum(int(matrix.parameter.count_nonzero()) for matrix in matrices)

    def structure(self, share: float) -> Prune | None:
        """The stage of units for a share of what is asked; None where nothing goes as units."""
        sparsity = min(share * self.asked / self.units, MOST)
        return self.stage.structure_part(sparsity) if sparsity else None

    def weights(self, model: PreTrainedModel) -> Prune | None:
        """The stage of single weights for what is left to remove; None where it is nothing."""
        left = self._entries(model)
        zeros = left - (self.total - self.asked)
        return self.stage.weights_part(zeros / left) if zeros > 0 else None


def _without_units(
    budget: _Budget, analysis: Analysis, share: float
) -> tuple[PreTrainedModel, Plan, list[dict[str, Any]]]:
    """A copy of the model without the units of a share, re-fitted."""
    structure = budget.structure(share)
    if structure is None:
        model = analysis.model
        return copy.deepcopy(model), Plan(model.config.model_type), []
    done = prune_once(analysis, structure)
    return done.model, done.decision.selection.plan, [done.entry]


def _search(
    budget: _Budget, analysis: Analysis, trials: int
) -> tuple[float, list[dict[str, float]]]:
    """The best share of what is asked to remove as units, and what each that was tried gave."""
    judge = Judge(analysis.dense, analysis.refit_batches)
    own = dataclasses.replace(analysis, refit_batches=judge.fitted, targets=None, seconds={})
    entries: list[dict[str, float]] = []

    def error(share: float) -> float:
        model, _, _ = _without_units(budget, own, share)
        left = budget.nonzero(model)
        part = budget.weights(model)
        if part is not None:
            prune_stage_(model, part, judge.fitted, analysis.seed)
        found = judge.error(model)
        zeroed = left - budget.nonzero(model)
        gone = budget.total - left
        entries.append({"share": share, "error": found, "with_units": gone, "zeroed": zeroed})
        logger.info("%.3f of what is asked as units: %.3e", share, found)
        return found

    tried = try_splits(error, trials)
    best = min(tried, key=lambda pair: pair[1])[0]
    for entry in entries:
        entry["accepted"] = float(entry["share"] == best)
    return best, entries


def prune_jointly(
    model: PreTrainedModel,
    stage: Prune,
    batches: Sequence[Batch],
    seed: int,
    *,
    aim: Aim,
) -> Both:
    """Carry out a stage in which heads or neurons and single weights share one sparsity.

    Args:
        model: of a known family; not changed.
        stage: a joint one. Of the entries of all matrices in which its single weights are, at least
            `sparsity` are afterwards gone with units, or zero.
        batches: calibration batches, already checked.
        seed: of everything random.
        aim: what re-fits aim at, and splits are compared with.

    Raises:
        ConfigError: when no site or no matrix is left.
        DataError: when calibration data is missing, or too little to judge with.
        NumericsError: when a statistic, a score or an input is not finite.
    """
    analysis = analyse(model, stage.structure_part(0.0), batches, seed, dense=aim.dense)
    budget = _Budget(analysis, stage)
    start = time.perf_counter()
    share, splits = _search(budget, analysis, stage.search_trials or SPLITS)
    seconds = {"search": time.perf_counter() - start}
    small, plan, entries = _without_units(budget, analysis, share)
    masks, part = Masks(), budget.weights(small)
    if part is not None:
        step, masks, entry = prune_weights(small, part, analysis.refit_batches, seed, masks)
        plan = plan.then(step)
        entries = [*entries, entry]
    gone = budget.total - budget.nonzero(small)
    whole: dict[str, Any] = {
        "kind": "joint",
        "total": budget.total,
        "asked_to_remove": budget.asked,
        "removed": gone,
        "sparsity": gone / budget.total,
        "met": gone >= budget.asked,
        "share_of_units": share,
        "splits": splits,
        "seconds": seconds,
    }
    if stage.polish_steps:
        start, data = time.perf_counter(), (analysis.refit_batches, aim.judges)
        whole["polish"] = polish_(
            small, aim.dense, *data, steps=stage.polish_steps, ignore=stage.ignore
        )
        seconds["polish"] = time.perf_counter() - start
    return Both(small, plan, masks, [whole, *entries])

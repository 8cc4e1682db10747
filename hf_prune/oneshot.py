"""A structured stage carried out at once: analyse, choose, remove, re-fit.

What is known about a model before anything is decided (statistics, rankings, what the dense network
computes) is gathered once, and serves any number of targets.
"""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hf_prune.criteria import get_criterion, needs
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, DataError
from hf_prune.recipe import Prune
from hf_prune.search.experience import Case, Experience, case_of
from hf_prune.search.floor import by_bisection, by_optuna
from hf_prune.search.levels import LevelSearch
from hf_prune.search.trials import FloorRun, Metric, measured
from hf_prune.sites import ALL_KINDS, HIDDEN, QUERY_HEADS, Site, find_sites
from hf_prune.statistics.batches import Batch, first_examples
from hf_prune.statistics.collect import INPUTS, OUTPUTS, collect
from hf_prune.statistics.processes import of_the_main_process
from hf_prune.statistics.ridge import ridge_of
from hf_prune.statistics.score import score
from hf_prune.surgery.dense import DenseTargets, dense_targets
from hf_prune.surgery.reconstruct import refit_as_asked
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.width import refit_width
from hf_prune.targets import Chooser, Decision, Shares, Tables
from hf_prune.training.aim import same_on_all_processes
from hf_prune.training.polish import polish_

logger = logging.getLogger(__name__)


@dataclass
class Analysis:
    """What is known about a model before a stage decides.

    Attributes:
        model: to be pruned; never changed.
        sites: what can go.
        rankings: in which order, and what is lost.
        refit_batches: for the re-fit.
        dense: the network that the re-fit aims at; `model` itself, unless it was pruned before.
        given: the network before anything was pruned, which a floor is measured from, and of
            which targets are shares.
        seed: of everything random.
        seconds: wall time of each step so far.
        shares: latencies that were measured so far, as `Chooser` takes them.
        tables: of latencies, the same.
        judges: examples that nothing is fitted to, where the stage has a polish.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    rankings: Mapping[str, Ranking]
    refit_batches: Sequence[Batch]
    dense: PreTrainedModel
    given: PreTrainedModel
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    targets: DenseTargets | None = None
    judges: Sequence[Batch] = ()
    shares: Shares = field(default_factory=dict)
    tables: Tables = field(default_factory=dict)

    def dense_targets(self) -> DenseTargets:
        """What the dense network computes on the batches of the re-fit; computed once."""
        if self.targets is None:
            with _timed(self.seconds, "dense_pass"):
                self.targets = dense_targets(self.dense, self.refit_batches)
        return self.targets


class _timed:  # a context manager, used like a function
    """Adds the wall time of a `with` block to an entry of a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        passed = time.perf_counter() - self.start
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + passed


def analyse(
    model: PreTrainedModel,
    stage: Prune,
    batches: Sequence[Batch],
    seed: int,
    *,
    dense: PreTrainedModel | None = None,
    given: PreTrainedModel | None = None,
    judges: Sequence[Batch] = (),
) -> Analysis:
    """Find the sites of a model, collect what the criterion needs, and rank the units.

    Args:
        model: not changed.
        stage: a structured one.
        batches: calibration batches, already checked; as many examples as the stage asks for are
            used.
        seed: of everything random.
        dense: what the re-fit aims at, where `model` itself is no longer dense; a parallel one aims
            at `model` all the same, whose units the plan numbers.
        given: what a floor is measured from, and targets are shares of; `dense`, if not said.
        judges: of a polish, where the stage has one, from `with_judges`.

    Raises:
        ConfigError: when no site is left.
        DataError: when calibration data is missing or unfit.
        NumericsError: when a statistic or a score is not finite.
    """
    sites = find_sites(model, stage.units, stage.ignore)
    if not sites:
        raise ConfigError(
            f"no site is left to prune: the model has no units of {list(stage.units)}, or "
            f"ignore={list(stage.ignore)} matches all of them."
        )
    _warn_of_missing(model, sites, stage)
    seconds: dict[str, float] = {}
    wanted = needs(get_criterion(stage.criterion))
    if stage.units == (HIDDEN,) and set(wanted) & (INPUTS | OUTPUTS):
        raise ConfigError(
            f"criterion {stage.criterion!r} looks at what enters one projection, and many read the "
            "hidden width. Use fisher, taylor, or magnitude."
        )
    few = first_examples(model, batches, stage.calibration_samples)
    with _timed(seconds, "statistics"):
        statistics = collect(model, sites, few, wanted, seed, stage.projections)
    with _timed(seconds, "scores"):
        rankings = score(model, sites, stage.criterion, statistics, seed)
    many = first_examples(model, batches, stage.reconstruction_samples or stage.calibration_samples)
    alone = dense is None or stage.reconstruction == "parallel"
    aim = model if alone or dense is None else dense
    given = given or dense or model
    return Analysis(model, sites, rankings, many, aim, given, seed, seconds=seconds, judges=judges)


def _warn_of_missing(model: PreTrainedModel, sites: Sequence[Site], stage: Prune) -> None:
    """Say which kinds of units a stage names that the model does not have."""
    there = {site.kind for site in find_sites(model, ALL_KINDS)}
    missing = sorted(set(stage.units) - there - {HIDDEN, QUERY_HEADS})
    if QUERY_HEADS in stage.units and not any(site.kind == QUERY_HEADS for site in sites):
        missing.append(QUERY_HEADS)
    if missing:
        others = sorted(there - set(stage.units))
        also = f" It also has {', '.join(others)}." if others else ""
        logger.warning(
            "%s has no %s: nothing of that kind is pruned.%s",
            type(model).__name__,
            ", ".join(missing),
            also,
        )


@dataclass(frozen=True)
class Pruned:
    """A model after a stage, what was decided, and the entry of the report."""

    model: PreTrainedModel
    decision: Decision
    entry: dict[str, Any]


def carry_out(analysis: Analysis, decision: Decision, stage: Prune) -> Pruned:
    """A copy of the analysed model with the plan carried out, and what stays re-fitted."""
    seconds: dict[str, float] = {}
    same_on_all_processes(decision.selection)
    model = copy.deepcopy(analysis.model)
    with _timed(seconds, "remove"):
        remove_units(model, decision.selection.plan)
    fitted: list[str] = []
    if stage.reconstruct or stage.rescale:
        targets = analysis.dense_targets()
        hidden = decision.selection.plan.sites.get(HIDDEN)
        with _timed(seconds, "reconstruct"):
            if hidden is None:
                fitted = refit_as_asked(model, targets, stage, decision.selection.plan)
            elif hidden.removed:
                fitted = refit_width(model, targets, hidden.kept, ridge=ridge_of(model, stage))
    entry = {
        "kind": "structure",
        **decision.to_dict(),
        "refitted": len(fitted),
        "seconds": {**analysis.seconds, **seconds},
    }
    for line in decision.selection.shortfalls():
        logger.warning(line)
    return Pruned(model, decision, entry)


def prune_once(
    analysis: Analysis,
    stage: Prune,
    metric: Metric | None = None,
    experience: Experience | None = None,
) -> Pruned:
    """Carry out a stage on an analysed model.

    Args:
        analysis: from `analyse`, of this stage or of one that differs in its target only.
        stage: a structured one.
        metric: needed where the stage has a floor.
        experience: of past searches above a floor; this one starts from it, and is added to it.

    Raises:
        CheckpointError: when the store of experience cannot be used.
        ConfigError: when the stage has a floor and there is no metric.
    """
    start = time.perf_counter()
    chooser = Chooser(
        analysis.model,
        analysis.sites,
        analysis.rankings,
        stage,
        given=analysis.given,
        shares=analysis.shares,
        tables=analysis.tables,
    )
    if stage.floor is not None:
        if metric is None:
            raise ConfigError(
                "the stage has a floor: pass compress(..., metric=...), a function from a model to "
                "a number, higher = better, on data that is neither calibrated nor reported on."
            )
        return _above_floor(analysis, chooser, stage, metric, experience)
    decision = chooser.choose()
    seconds = {"solve": time.perf_counter() - start}
    trials: list[dict[str, float]] = []
    if stage.search_trials:
        with _timed(seconds, "search"):
            decision, trials = _search(analysis, chooser, decision, stage)
    pruned = carry_out(analysis, decision, stage)
    pruned.entry["seconds"] |= seconds
    if trials:
        pruned.entry["search"] = trials
    if stage.polish_steps:
        data = (analysis.refit_batches, analysis.judges)
        with _timed(pruned.entry["seconds"], "polish"):
            found = polish_(
                pruned.model, analysis.dense, *data, steps=stage.polish_steps, ignore=stage.ignore
            )
        pruned.entry["polish"] = found
    return pruned


def _search(
    analysis: Analysis, chooser: Chooser, decision: Decision, stage: Prune
) -> tuple[Decision, list[dict[str, float]]]:
    """Refine the widths of a decision on what the re-fitted network really does."""
    search = LevelSearch(
        analysis.model,
        analysis.sites,
        analysis.rankings,
        stage,
        chooser.goals_met_by(decision),
        analysis.refit_batches,
        analysis.seed,
        analysis.dense,
    )
    start = chooser.counts_of(decision.selection)
    found = search.run(start, stage.search_trials)
    if found == start:
        return decision, search.trials
    better = chooser.decision_of(found, decision)
    if better.selection.met or better.wrong <= decision.wrong:
        return better, search.trials
    logger.warning(
        "the widths that the search found are %+.1f %% off the latency that was asked for: those "
        "that it started from are kept.",
        100 * better.wrong,
    )
    return decision, search.trials


def _above_floor(
    analysis: Analysis,
    chooser: Chooser,
    stage: Prune,
    metric: Metric,
    experience: Experience | None,
) -> Pruned:
    """The smallest model that keeps the metric, between nothing and all that is asked for."""
    floor = stage.floor
    assert floor is not None  # noqa: S101  # asked for one
    start_of_stage = time.monotonic() - sum(analysis.seconds.values())
    least = measured(metric, analysis.given) - floor.drop
    if math.isnan(least):
        raise DataError("the metric of the dense model is not a number.")
    case = case_of(
        analysis.model.config.model_type,
        analysis.sites,
        chooser.rankings,
        chooser.goals[0],
        stage,
    )
    start = _expected(experience, case)

    def build(decision: Decision) -> Pruned:
        return carry_out(analysis, decision, stage)

    run = FloorRun(chooser, floor, build, metric, least, start=start_of_stage)
    if floor.search == "optuna":
        kinds = {site.kind for site in analysis.sites}
        tilts = ("heads", "depth") if "heads" in kinds and len(kinds) > 1 else ("depth",)
        by_optuna(run.attempt, floor, run.late, start, seed=analysis.seed, tilts=tilts)
    else:
        by_bisection(run.attempt, floor, run.late, start)
    if run.best is None:
        logger.warning("no smaller model above the floor was found: nothing is removed.")
        best = carry_out(analysis, chooser.nothing(), stage)
    else:
        best = run.best[2]
    best = dataclasses.replace(best, decision=chooser.against_all(best.decision))
    best.entry.update(best.decision.to_dict())
    reached = run.reached()
    if experience is not None and reached is not None:
        removed, trials = reached * case.asked, len(run.trials)
        of_the_main_process(lambda: experience.add(case, removed=removed, trials=trials))
    best.entry["floor"] = {"least": least, "trials": run.trials, "started_from": start}
    return best


def _expected(experience: Experience | None, case: Case) -> float | None:
    """Where the search is expected to end, read by the main process for all."""
    if experience is None:
        return None
    return of_the_main_process(lambda: experience.start_for(case))

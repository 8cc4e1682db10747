"""From what a stage asks for to goals in numbers, and to a plan that really meets them.

Parameters, MACs and bytes are counted. A latency is looked up in a table that was measured on this
machine; then a model of the chosen widths is timed beside the dense one, and where the table was
wrong the goal is moved and the widths are chosen again. Widths alone decide the time, so this
needs no trained weights.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hf_prune.budget.costs import Goal, make_goal
from hf_prune.budget.levels import Levels, stage_levels
from hf_prune.budget.prepare import prepare
from hf_prune.budget.selection import Outcome, Selection, decide, selection_of
from hf_prune.criteria.ranking import Ranking
from hf_prune.goals import allowed_ns, counted_goals
from hf_prune.measure.counts import (
    count_encoder_parameters,
)
from hf_prune.measure.latency import Latency, compare_latency
from hf_prune.measure.latency_table import (
    NS_PER_MS,
    LatencyTable,
    Shape,
    latency_table,
    shaped_like,
)
from hf_prune.measure.lengths import site_lengths
from hf_prune.plan import Plan
from hf_prune.recipe import Prune
from hf_prune.sites import Site
from hf_prune.statistics.processes import of_the_main_process

logger = logging.getLogger(__name__)

LATENCY = "latency_ns"
"""The name of the cost that is time."""
TOLERANCE = 0.05
"""A measured latency this close to the one asked for is met."""
CLOSE_ENOUGH = 0.015
"""The goal is not moved for less than this."""
MOVED = 0.1
"""A dense model that has become faster or slower by more than this is named."""
NO_CLOSER = f"of the widths that were timed none came within {TOLERANCE:.0%}"
"""Why a latency is not met that floors do not limit."""
FLOOR = "the floor of the metric holds the rest"
"""Why a search above a floor removes no more."""
MAX_ATTEMPTS = 4
"""How often widths are chosen and timed."""
ROUNDS = 15
"""Rounds in which the chosen widths are timed beside the dense model."""


@dataclass(frozen=True)
class Timing:
    """What was asked of the latency, what the table promised, and what was measured; in ms."""

    asked_ms: float
    predicted_ms: float
    measured_ms: float
    dense_ms: float
    attempts: int
    shape: Shape

    @property
    def wrong(self) -> float:
        """How far the measured latency is from the asked one, as a share of it."""
        return self.measured_ms / self.asked_ms - 1

    @property
    def met(self) -> bool:
        """Whether it is no slower than asked, but for `TOLERANCE`."""
        return self.wrong <= TOLERANCE

    def to_dict(self) -> dict[str, object]:
        """For the report. `deviation` is that of the measured from the asked."""
        return {
            **dataclasses.asdict(self),
            "speedup": self.dense_ms / self.measured_ms,
            "deviation": self.wrong,
            "deviation_of_table": self.predicted_ms / self.measured_ms - 1,
        }


@dataclass(frozen=True)
class Decision:
    """A selection, and how its latency was measured where it was asked for."""

    selection: Selection
    timing: Timing | None = None

    @property
    def wrong(self) -> float:
        """How far a measured latency is from the asked one; 0 where none was asked for."""
        return self.timing.wrong if self.timing else 0.0

    def to_dict(self) -> dict[str, object]:
        """For the report."""
        timing = {"timing": self.timing.to_dict()} if self.timing else {}
        return {**self.selection.to_dict(), **timing}


def _with_timing(selection: Selection, goal: Goal, timing: Timing) -> Selection:
    """A selection whose last outcome is what was measured."""
    removed = round(goal.total - timing.measured_ms * NS_PER_MS)
    outcome = Outcome(goal.cost, goal.asked, removed, goal.total, TOLERANCE)
    return dataclasses.replace(selection, outcomes=(*selection.outcomes[:-1], outcome))


def _scaled(goal: Goal, scale: float) -> Goal:
    return dataclasses.replace(goal, asked=math.ceil(goal.asked * scale))


Shares = dict[tuple[Shape, tuple[tuple[str, int], ...]], float]
"""Measured latencies as shares of the dense model's, by shape and by how much each site keeps."""

Tables = dict[tuple[Shape, bool], LatencyTable]
"""Measured tables, by the shape of the input and whether sites may lose all units."""


@dataclass
class Chooser:
    """Chooses widths for one model and one stage, again and again for different amounts.

    What is slow (counts, the latency table) is done once. Times are those of the main process, so
    that all processes choose alike; all of them must ask.

    Attributes:
        model: whose widths are chosen; not changed.
        sites: of it.
        rankings: in which order the units of each site go.
        stage: a structured one.
        table: from an earlier run; measured where it is needed, if not given.
        given: the network before anything was pruned, of which targets are shares; `model` itself,
            if not given.
        shares: latencies of networks that were timed, as shares of the dense one's, to which those
            that this one times are added: the same widths are not timed again.
        tables: measured tables by the shape of the input and whether sites may be empty, to which
            one that this one measures is added.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    rankings: Mapping[str, Ranking]
    stage: Prune
    table: LatencyTable | None = None
    given: PreTrainedModel | None = None
    shares: Shares = field(default_factory=dict)
    tables: Tables = field(default_factory=dict)

    def __post_init__(self) -> None:
        target = self.stage.target
        levels: Levels = stage_levels(self.sites, self.stage)
        if self.rankings:  # while a model trains they come later
            ready = prepare(self.sites, self.rankings, self.stage)
            self.rankings, levels = ready.rankings, ready.levels
        self.goals: list[Goal] = []
        self.shape = Shape(target.batch_size if target else 1, self.stage.sequence_length)
        if target is None:
            layers = (self.stage.of, self.stage.cost) == ("layers", "parameters")
            length = self.stage.sequence_length
            macs = self.stage.cost == "macs"
            goal = make_goal(
                self.sites,
                self.stage.cost,
                self.stage.fraction,
                tokens=site_lengths(self.model, self.sites, length) if macs else length,
                base=count_encoder_parameters(self.model) if layers else None,
            )
            self.goals.append(goal)
            return
        given = self.given or self.model
        self.goals += counted_goals(self.model, given, self.sites, self.stage, target)
        if target.timed:
            if self.table is None:
                empty = any(counts[0] == 0 for counts in levels.values())
                key = (self.shape, empty)
                if key not in self.tables:
                    self.tables[key] = of_the_main_process(
                        lambda: latency_table(self.model, self.sites, self.shape, empty=empty)
                    )
                self.table = self.tables[key]
                if target.latency_ms is not None:
                    self.table = self.table.times(of_the_main_process(self._moved))
            tables = self.table.tables(self.sites)
            total = self.table.total_ns
            self.given_ns = round(of_the_main_process(self._given_share) * total)
            asked = max(0, total - allowed_ns(target, self.given_ns))
            self.goals.append(Goal(LATENCY, tables, total, asked))

    def choose(self, scale: float = 1.0, weights: Mapping[str, float] | None = None) -> Decision:
        """The plan that removes `scale` of what the stage asks for.

        Args:
            scale: in [0, 1].
            weights: by site, what its errors are multiplied by before they are compared.
        """
        goals = [_scaled(goal, scale) for goal in self.goals]
        weighed = dict(self.rankings)
        for name, weight in (weights or {}).items():
            weighed[name] = weighed[name].times(weight)
        if self.table is None:
            return Decision(self._decide(goals, weighed))
        return self._choose_timed(goals[:-1], goals[-1], self.table, weighed)

    def nothing(self) -> Decision:
        """The plan that removes nothing, whatever is asked for."""
        counts = {site.name: site.units for site in self.sites}
        model_type = self.model.config.model_type
        made = selection_of(self.sites, self.rankings, counts, self.goals, model_type=model_type)
        limit = "no smaller model was found above the floor"
        return Decision(dataclasses.replace(made, limit=limit))

    def against_all(self, decision: Decision) -> Decision:
        """A decision for a part of what the stage asks for, compared with all of it."""
        selection = decision.selection
        outcomes = tuple(
            dataclasses.replace(outcome, asked=goal.asked)
            for outcome, goal in zip(selection.outcomes, self.goals, strict=True)
        )
        whole = dataclasses.replace(selection, outcomes=outcomes)
        if not whole.met and selection.met:
            whole = dataclasses.replace(whole, limit=FLOOR)
        return dataclasses.replace(decision, selection=whole)

    def predict(self, scale: float) -> Selection:
        """The plan that removes `scale` of what the stage asks for, by the table alone."""
        return self._decide([_scaled(goal, scale) for goal in self.goals], self.rankings)

    def counts_of(self, selection: Selection) -> dict[str, int]:
        """How many units of each site a selection keeps."""
        return {name: len(site.kept) for name, site in selection.plan.sites.items()}

    def decision_of(self, counts: Mapping[str, int], like: Decision) -> Decision:
        """The decision for given widths, timed where `like` was."""
        model_type = self.model.config.model_type
        made = selection_of(self.sites, self.rankings, counts, self.goals, model_type=model_type)
        if like.timing is None or self.table is None:
            return Decision(made)
        goal = self.goals[-1]
        timing = self._timing(goal, counts, self.table, like.timing.attempts)
        return self._timed(_with_timing(made, goal, timing), timing)

    def goals_met_by(self, decision: Decision) -> list[Goal]:
        """The goals, as far as a decision meets them: no other widths may spend more."""
        counts = self.counts_of(decision.selection)
        return [
            dataclasses.replace(goal, asked=goal.prunable - max(goal.budget, goal.spent(counts)))
            if goal.cost != LATENCY
            else dataclasses.replace(goal, asked=goal.prunable - goal.spent(counts))
            for goal in self.goals
        ]

    def _decide(self, goals: Sequence[Goal], rankings: Mapping[str, Ranking]) -> Selection:
        model_type = self.model.config.model_type
        found = decide(self.sites, rankings, self.stage, goals, model_type=model_type)
        counts = self.counts_of(found)  # the error that is reported is not weighed
        return selection_of(self.sites, self.rankings, counts, goals, model_type=model_type)

    def _choose_timed(
        self,
        others: Sequence[Goal],
        goal: Goal,
        table: LatencyTable,
        rankings: Mapping[str, Ranking],
    ) -> Decision:
        moved = goal
        found: list[tuple[Selection, Timing]] = []
        seen: list[Plan] = []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            selection = self._decide([*others, moved], rankings)
            if selection.plan in seen:
                break  # nothing else is to be had
            seen.append(selection.plan)
            timing = self._timing(goal, self.counts_of(selection), table, attempt)
            found.append((selection, timing))
            wrong = timing.wrong
            if abs(wrong) < CLOSE_ENOUGH:
                break
            spent = goal.total - moved.asked
            moved = dataclasses.replace(
                moved, asked=max(0, round(goal.total - spent / (1 + wrong)))
            )
        selection, best = min(found, key=lambda pair: (not pair[1].met, abs(pair[1].wrong)))
        timing = dataclasses.replace(best, attempts=len(found))
        return self._timed(_with_timing(selection, goal, timing), timing)

    def _timed(self, selection: Selection, timing: Timing) -> Decision:
        """A timed selection, with what keeps it from being faster: floors, or the clock."""
        if not timing.met:
            everything = [dataclasses.replace(goal, asked=goal.prunable) for goal in self.goals]
            if selection.plan != self._decide(everything, self.rankings).plan:
                selection = dataclasses.replace(selection, limit=NO_CLOSER)
        return Decision(selection, timing)

    def _timing(
        self, goal: Goal, counts: Mapping[str, int], table: LatencyTable, attempt: int
    ) -> Timing:
        return Timing(
            asked_ms=(goal.total - goal.asked) / NS_PER_MS,
            predicted_ms=table.predict_ns(self.sites, counts) / NS_PER_MS,
            measured_ms=of_the_main_process(lambda: self._measure(counts)) * goal.total / NS_PER_MS,
            dense_ms=self.given_ns / NS_PER_MS,
            attempts=attempt,
            shape=self.shape,
        )

    def _moved(self) -> float:
        """How much slower the dense model is now than when the table was measured.

        Shares of a table hold, but milliseconds are those of a day: of another load, or clock.
        """
        assert self.table is not None  # noqa: S101  # it has been measured
        now = self._compare({"dense": self.model})["dense"].median_ms
        moved = now * NS_PER_MS / self.table.total_ns
        if abs(moved - 1) > MOVED:
            logger.warning(
                "the dense model takes %.1f ms now, %.2f times as long as in the latency table: "
                "the table is adjusted.",
                now,
                moved,
            )
        return moved

    def _measure(self, counts: Mapping[str, int]) -> float:
        """The latency of a model of some widths, as a share of the dense model's."""
        key = (self.shape, tuple(sorted(counts.items())))
        if key not in self.shares:
            models = {"dense": self.model, "pruned": shaped_like(self.model, counts)}
            self.shares[key] = self._compare(models)["pruned"].ratio
        return self.shares[key]

    def _given_share(self) -> float:
        """The latency of the given network, as a share of that of the model to be pruned."""
        if self.given is None or self.given is self.model:
            return 1.0
        return self._compare({"model": self.model, "given": self.given})["given"].ratio

    def _compare(self, models: Mapping[str, PreTrainedModel]) -> dict[str, Latency]:
        return compare_latency(
            models,
            batch_size=self.shape.batch_size,
            sequence_length=self.shape.sequence_length,
            rounds=ROUNDS,
        )

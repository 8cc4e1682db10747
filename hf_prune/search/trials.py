"""The trials of a search above a floor: built, measured, and the smallest good one remembered."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_prune.errors import DataError
from hf_prune.plan import Plan
from hf_prune.recipe import Floor
from hf_prune.search.floor import FIRST_STEP, Point, Tried
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.targets import Chooser, Decision

logger = logging.getLogger(__name__)

Metric = Callable[[PreTrainedModel], float]
"""A figure of a model on data that was not calibrated on; higher = better."""


class Built(Protocol):
    """What a trial builds."""

    @property
    def model(self) -> PreTrainedModel:
        """The smaller model."""


B = TypeVar("B", bound=Built)


@dataclass
class FloorRun(Generic[B]):
    """A search for the smallest model above a floor, and the best that it has found.

    Attributes:
        chooser: of widths.
        floor: trials, precision, time.
        build: carries a decision out.
        metric: of what was built.
        least: that it may have.
        trials: for the report.
        best: share that is gone, scale, and what was built.
        known: plans that were built, and their metric.
        start: of the stage, in seconds of `time.monotonic`: its statistics are a part of the time.
    """

    chooser: Chooser
    floor: Floor
    build: Callable[[Decision], B]
    metric: Metric
    least: float
    trials: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, float, B] | None = None
    known: list[tuple[Plan, float]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def attempt(self, point: Point) -> Tried:
        """Build and measure one model; the smallest good one is remembered."""
        weights = point.weights(self.chooser.sites)
        decision = self.chooser.choose(point.scale, weights)
        plan, built = decision.selection.plan, None
        value = next((value for known, value in self.known if known == plan), None)
        if value is None:
            built = self.build(decision)
            value = measured(self.metric, built.model)
            self.known.append((plan, value))
        if math.isnan(value):
            logger.warning("the metric of a trial is not a number: it is below every floor.")
        outcome = decision.selection.outcomes[0]
        removed = outcome.removed / max(outcome.total, 1)
        tried = Tried(point, value, removed, value >= self.least)
        self.trials.append(tried.to_dict())
        logger.info("floor %.4f: %.4f with %.3f gone", self.least, value, removed)
        if built is not None and tried.good and (self.best is None or removed > self.best[0]):
            self.best = removed, point.scale, built
        return tried

    def reached(self) -> float | None:
        """The share of what is asked for at which the search ended; None where it is not known.

        Where nothing good was found before trials or time were over, it lies anywhere below.
        """
        if self.best is not None:
            return self.best[1]
        lowest = min((trial["scale"] for trial in self.trials), default=1.0)
        return 0.0 if lowest <= FIRST_STEP * self.floor.precision else None

    def late(self) -> bool:
        """Whether the time is over, on any process."""
        late = time.monotonic() - self.start > 60 * self.floor.max_minutes
        return _on_all_processes(float(late)) > 0


def measured(metric: Metric, model: PreTrainedModel) -> float:
    """The metric of a model, over all processes.

    Raises:
        DataError: when it is not one number.
    """
    found = metric(model)
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the metric gave {found!r}. A floor needs one number, higher = better: return a "
            "float, such as evaluation['accuracy']."
        ) from error
    return _on_all_processes(value)


def _on_all_processes(value: float) -> float:
    """The mean over all processes: they must go the same way."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    total = sum_over_processes(torch.tensor(value, dtype=torch.float64, device=state.device))
    return float(total) / int(state.num_processes)

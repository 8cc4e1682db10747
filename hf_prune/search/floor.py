"""How much may go before a metric falls below a floor: bisection, or Optuna.

Bisection moves one number, the share of what is asked for that is removed. Optuna moves two more,
by which heads and neurons, and early and late layers, are weighed against each other.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_prune.errors import ConfigError
from hf_prune.recipe import Floor
from hf_prune.sites import Site

logger = logging.getLogger(__name__)

FIRST_STEP = 2.0
"""Of a search that knows where to start, in units of its precision."""
GROWTH = 3.0
"""How much longer each further step away from there is."""
LARGEST_TILT = 2.0
"""Errors are weighed by at most `exp` of this, in either direction."""


@dataclass(frozen=True)
class Point:
    """What one trial builds.

    Attributes:
        scale: share of what is asked for that is removed, in [0, 1].
        heads: how much more the errors of heads count than those of other units, as a logarithm.
        depth: the same for the last layer of a stack over its first.
    """

    scale: float
    heads: float = 0.0
    depth: float = 0.0

    def weights(self, sites: Sequence[Site]) -> dict[str, float] | None:
        """By which the errors of each site are multiplied; None where nothing is."""
        if not self.heads and not self.depth:
            return None
        return {
            site.name: math.exp(
                self.heads * (site.kind == "heads")
                + self.depth * (site.layer / max(site.depth - 1, 1) - 0.5)
            )
            for site in sites
        }


@dataclass(frozen=True)
class Tried:
    """What a trial came to: the metric, and the share of the whole that is gone.

    `good` where the metric is not below the floor.
    """

    point: Point
    metric: float
    removed: float
    good: bool

    def to_dict(self) -> dict[str, float]:
        """For the report."""
        tilts = {"heads": self.point.heads, "depth": self.point.depth}
        named = {name: value for name, value in tilts.items() if value}
        return {"scale": self.point.scale, "metric": self.metric, "removed": self.removed, **named}


Attempt = Callable[[Point], Tried]
"""Builds and measures one model."""


@dataclass
class _Bracket:
    """Scales between which the largest good one lies. Nothing removed is always good."""

    attempt: Attempt
    floor: Floor
    late: Callable[[], bool]
    low: float = 0.0
    high: float = 1.0
    trials: int = 0

    def over(self) -> bool:
        """Whether no further trial is wanted."""
        known = self.high - self.low <= self.floor.precision * (1 + 1e-9)
        return self.trials >= self.floor.trials or known or (self.trials > 0 and self.late())

    def try_(self, scale: float) -> bool:
        """Try a scale, and narrow the bracket."""
        self.trials += 1
        good = self.attempt(Point(scale)).good
        if good:
            self.low = scale
        else:
            self.high = scale
        return good

    def around(self, start: float) -> None:
        """Step away from where the answer is expected, in growing steps, until it is passed."""
        step = FIRST_STEP * self.floor.precision
        scale = min(max(start, step), 1.0)  # nothing removed is good untried
        up = self.try_(scale)
        while not self.over():
            scale = min(scale + step, 1.0) if up else max(scale - step, 0.0)
            if scale <= 0 or self.try_(scale) != up:
                return
            step *= GROWTH


def by_bisection(
    attempt: Attempt, floor: Floor, late: Callable[[], bool], start: float | None = None
) -> None:
    """Try scales until the largest good one is known to `precision`, or trials or time are over.

    Args:
        attempt: tries a point, and remembers the best.
        floor: trials, precision.
        late: whether the time is over, asked after each trial.
        start: where the answer is expected; everything that is asked for is tried first, if not
            given.
    """
    bracket = _Bracket(attempt, floor, late)
    if start is None:
        if bracket.try_(1.0):
            return
    else:
        bracket.around(start)
    while not bracket.over():
        bracket.try_((bracket.low + bracket.high) / 2)


def by_optuna(
    attempt: Attempt,
    floor: Floor,
    late: Callable[[], bool],
    start: float | None = None,
    *,
    seed: int = 0,
    tilts: Sequence[str] = ("heads", "depth"),
) -> None:
    """Try points by a tree-structured Parzen estimator, until trials or time are over.

    Nothing is left to try once everything that is asked for was good.

    Args:
        attempt: as in `by_bisection`.
        floor: trials.
        late: as in `by_bisection`.
        start: the scale of the first trial, untilted; the whole, if not given.
        seed: of the sampler.
        tilts: which of the tilts of a point are searched, too.

    Raises:
        ConfigError: when Optuna is not installed.

    Source: Bergstra et al. 2011, as Optuna implements it, arXiv:1907.10902.
    """
    try:
        import optuna  # an optional package
    except ImportError as error:
        raise ConfigError("search: optuna needs Optuna: pip install 'hf_prune[search]'") from error

    def objective(trial: optuna.Trial) -> float:
        scale = trial.suggest_float("scale", 0.0, 1.0)
        found = {name: trial.suggest_float(name, -LARGEST_TILT, LARGEST_TILT) for name in tilts}
        tried = attempt(Point(scale, **found))
        trial.set_user_attr("good", tried.good)
        return tried.removed if tried.good else -scale  # the less asked for, the likelier good

    def stop(study: optuna.Study, trial: "optuna.trial.FrozenTrial") -> None:
        everything = trial.params["scale"] >= 1 and trial.user_attrs["good"]
        if late() or everything:
            study.stop()

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        first: Mapping[str, float] = {"scale": 1.0 if start is None else start}
        study.enqueue_trial({**first, **dict.fromkeys(tilts, 0.0)})
        study.optimize(objective, n_trials=floor.trials, callbacks=[stop])
    finally:
        optuna.logging.set_verbosity(verbosity)

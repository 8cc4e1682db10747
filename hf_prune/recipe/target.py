"""How much: shares and counts, what a model may cost, and what may be lost."""

import math
import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hf_prune.recipe.model import Model

_SHARE = re.compile(r"\d+(?:\.\d+)?x")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)x?")
PRECISION = 0.005
"""The default of a floor's `precision`."""


def _as_share(value: object) -> object:
    wrong = isinstance(value, float) or (isinstance(value, str) and not _SHARE.fullmatch(value))
    if wrong:
        raise ValueError(
            f"{value!r} is neither a share nor a count: write 0.5x for half of the given model"
        )
    return value


Share = Annotated[str | int, BeforeValidator(_as_share)]
"""`0.5x` of the given model, or an absolute count."""


class Target(Model):
    """What the whole model may cost after a stage. Each one that is given is met.

    Shares are of the model that was given, whatever earlier stages removed.
    """

    parameters: Share | None = None
    """All parameters of the model: `0.5x` of the given model, or a count."""
    macs: Share | None = None
    """Multiply-accumulates of one sequence of the stage's `sequence_length` tokens."""
    bytes: Share | None = None
    """Bytes of the weights, in the dtype that the model has."""
    latency_ms: float | None = Field(default=None, gt=0)
    """Time of one forward pass on this machine, in milliseconds."""
    speedup: float | str | None = None
    """How many times as fast as the given model's a forward pass is to be on this machine: `2x`, or
    2.0."""
    sparsity: float | None = None
    """Fraction of the parameters that the stage may remove, in [0, 1), beside other targets. Alone,
    it is what `sparsity` of the stage is."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences at once when time is measured, each of the stage's `sequence_length` tokens."""

    @field_validator("speedup")
    @classmethod
    def _at_least_one(cls, value: float | str | None) -> float | str | None:
        if value is not None and share_of(value) < 1:
            raise ValueError(f"speedup={value} is a slow-down: write 2x for twice as fast")
        return value

    @field_validator("sparsity")
    @classmethod
    def _a_fraction(cls, value: float | None) -> float | None:
        return check_fraction(value)

    @model_validator(mode="after")
    def _something(self) -> "Target":
        named = ("parameters", "macs", "bytes", "latency_ms", "speedup", "sparsity")
        if all(getattr(self, name) is None for name in named):
            raise ValueError(f"name at least one of {', '.join(named)}")
        if self.batch_size != 1 and not self.timed:
            raise ValueError("batch_size is for latency_ms and speedup: leave it out")
        for name in ("parameters", "macs", "bytes"):
            value = getattr(self, name)
            if isinstance(value, str) and not 0 < share_of(value) <= 1:
                raise ValueError(f"{name}={value} is not in (0x, 1x]")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value} is not a positive count")
        return self

    @property
    def timed(self) -> bool:
        """Whether the target is one of time, so that the model has to be timed."""
        return self.latency_ms is not None or self.speedup is not None


def check_fraction(sparsity: float | None) -> float | None:
    """The sparsity, where it is one.

    Raises:
        ValueError: where it is outside [0, 1).
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity:g} is outside [0, 1). It is a fraction, not a percentage: "
            "write 0.5 to remove half."
        )
    return sparsity


def share_of(value: "float | str") -> float:
    """The number before the `x`, or the number itself.

    Raises:
        ValueError: when it is neither.
    """
    if not isinstance(value, str):
        return float(value)
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a share: write 0.5x, or 2x")
    return float(match.group(1))


class Floor(Model):
    """How much of a metric may be lost. The smallest model that keeps it is searched for."""

    drop: float = Field(ge=0)
    """Largest loss that is allowed, in the metric's own unit: 0.01 is one point of accuracy."""
    trials: int = Field(default=8, ge=1)
    """Models that are built and measured at most."""
    max_minutes: float = Field(default=30.0, gt=0)
    """Of the whole stage, statistics included: then the best model so far is taken. One is always
    tried."""
    search: Literal["bisection", "optuna"] = "bisection"
    """`bisection`: of how much goes; `optuna`: of how heads and neurons, and early and late layers
    are weighed against each other, too (needs Optuna, and some dozens of trials)."""
    precision: float = Field(default=PRECISION, gt=0, le=1)
    """Bisection ends when the answer is known to this share of what is asked for."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "Floor":
        if self.search == "optuna" and self.precision != PRECISION:
            raise ValueError("precision is for search: bisection; optuna ends after trials")
        return self


def count_to_remove(sparsity: float, total: int) -> int:
    """The smallest count that is at least `sparsity` of `total`, exact: 0.07 of 100 is 7."""
    return math.ceil(Fraction(repr(float(sparsity))) * total)

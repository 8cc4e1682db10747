"""When how much goes: sparsity as a function of the step."""

import math
from collections.abc import Callable

from hf_prune.recipe import Schedule


def cubic(progress: float) -> float:
    """Share of the final sparsity at a progress in [0, 1]: fast at first, slow at the end.

    Source: Zhu and Gupta 2017, arXiv:1710.01878.
    """
    return 1.0 - (1.0 - progress) ** 3


def _exponential(progress: float, rate: float) -> float:
    return math.expm1(-rate * progress) / math.expm1(-rate)


def _curve(schedule: Schedule) -> Callable[[float], float]:
    curves: dict[str, Callable[[float], float]] = {
        "one_shot": math.ceil,
        "linear": lambda progress: progress,
        "cubic": cubic,
        "exponential": lambda progress: _exponential(progress, schedule.rate),
        "step": lambda progress: math.ceil(progress * schedule.levels) / schedule.levels,
    }
    return curves[schedule.kind]


def curve(schedule: Schedule, progress: float) -> float:
    """Share of the final sparsity at a progress: monotone, 0 up to 0 and 1 from 1 on."""
    if progress <= 0:
        return 0.0
    return 1.0 if progress >= 1 else min(1.0, float(_curve(schedule)(progress)))


def bounds(schedule: Schedule, max_steps: int) -> tuple[int, int]:
    """First and last step at which something is decided, `first < last`."""
    first = int(schedule.start * max_steps)
    return first, max(first + 1, round(schedule.end * max_steps))


def interval(schedule: Schedule, max_steps: int, epochs: float) -> int:
    """Optimizer steps between two decisions, in a training of so many epochs."""
    per_epoch = max(1, round(max_steps / epochs)) if epochs > 0 else max_steps
    return schedule.every * (per_epoch if schedule.per == "epochs" else 1)


def is_due(schedule: Schedule, step: int, max_steps: int, epochs: float = 1.0) -> bool:
    """Whether something is decided after this step (counted from 1)."""
    first, last = bounds(schedule, max_steps)
    every = interval(schedule, max_steps, epochs)
    return first < step <= last and ((step - first) % every == 0 or step == last)


def share(schedule: Schedule, step: int, max_steps: int) -> float:
    """Share of the final sparsity that holds after this step."""
    first, last = bounds(schedule, max_steps)
    return curve(schedule, (step - first) / (last - first))

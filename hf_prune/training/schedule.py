"""When how much goes: sparsity as a function of the step."""

from hf_prune.recipe import Schedule


def cubic(progress: float) -> float:
    """Share of the final sparsity at a progress in [0, 1]: fast at first, slow at the end.

    Monotone, 0 at 0 and 1 at 1. Source: Zhu and Gupta 2017, arXiv:1710.01878.
    """
    return 1.0 - (1.0 - min(max(progress, 0.0), 1.0)) ** 3


def bounds(schedule: Schedule, max_steps: int) -> tuple[int, int]:
    """First and last step at which something is decided, `first < last`."""
    first = int(schedule.start * max_steps)
    return first, max(first + 1, round(schedule.end * max_steps))


def is_due(schedule: Schedule, step: int, max_steps: int) -> bool:
    """Whether something is decided after this step (counted from 1)."""
    first, last = bounds(schedule, max_steps)
    return first < step <= last and ((step - first) % schedule.every == 0 or step == last)


def share(schedule: Schedule, step: int, max_steps: int) -> float:
    """Share of the final sparsity that holds after this step."""
    first, last = bounds(schedule, max_steps)
    return cubic((step - first) / (last - first))

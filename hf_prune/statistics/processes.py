"""What processes do for each other besides sums: one works for all, and each has a share."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_prune.errors import HfPruneError

T = TypeVar("T")


def of_the_main_process(make: Callable[[], T]) -> T:
    """What the main process makes, on all processes; the others wait, so that none disturbs it.

    For what is never the same twice, such as times, and for what only one may write.

    Args:
        make: run by the main process only; what it gives must be picklable.

    Raises:
        HfPruneError: on all processes, when it was raised on the main one.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    held: list[tuple[T | None, HfPruneError | None]] = [(None, None)]
    if state.is_main_process:
        try:
            held = [(make(), None)]
        except HfPruneError as error:
            held = [(None, error)]
    broadcast_object_list(held)
    value, failed = held[0]
    if failed is not None:
        raise failed
    return value  # type: ignore[return-value]  # there is one where there is no error


def share_of_process(count: int) -> int:
    """This process's part of a count for all of them; parts add up to it."""
    state = PartialState()
    each, extra = divmod(count, int(state.num_processes))
    return each + (int(state.process_index) < extra)

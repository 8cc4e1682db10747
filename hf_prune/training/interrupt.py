"""Ctrl-C: the step is finished and a checkpoint written before training ends."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState

from hf_prune.statistics.collect import sum_over_processes

logger = logging.getLogger(__name__)


class Interrupt:
    """Notes the first SIGINT; the second one ends the process at once, as ever."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: Any = None

    def arm(self) -> None:
        """Take the signal over, in the main thread; elsewhere signals cannot be taken."""
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            self.disarm()
            self.previous = signal.signal(signal.SIGINT, self._note)

    def disarm(self) -> None:
        """Give the signal back."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.disarm()
        logger.warning("interrupted: finishing this step, then saving. Again to end at once.")

    def agreed(self) -> bool:
        """Whether any process was interrupted: all of them stop at the same step."""
        state = PartialState()
        if state.num_processes > 1:
            noted = torch.tensor([float(self.requested)], device=state.device)
            self.requested = bool(sum_over_processes(noted) > 0)
        return self.requested

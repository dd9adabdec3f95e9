"""Reaction to SIGTERM and SIGINT.

Outside the training loop there is nothing to save, so the process stops at once. Inside it the request is only noted,
and all ranks stop together at the end of the step (``callbacks.StopCallback``). A process that is publishing goes on:
it needs seconds, and its work would be lost.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_trainer.errors import StoppedError


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT. Only in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raises StoppedError if a request was noted."""
        if self.requested:
            raise StoppedError("asked to stop after the last step, whose checkpoint is complete")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, a request is noted and nothing more."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            self._deferred = True  # a second signal must not cut the end that the first one began
            name = signal.Signals(number).name
            raise StoppedError(f"asked to stop by {name} outside the training loop, where there is nothing to save")

"""Reaction to SIGTERM and SIGINT, on this process or on any other of the gang.

Outside the training loop there is nothing to save, so the process ends at once. Inside it the request is only noted,
and all ranks stop together at the end of the step (``callbacks.BoundaryCallback``). A process that is publishing goes
on: it needs seconds, and its work would be lost.

The request is handled by a thread. A handler of Python's own runs only between two steps of the main thread's
bytecode, which may be minutes away while it fetches a model or waits for a peer; the thread ends the process at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_trainer.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and since when."""

    def __init__(self) -> None:
        self.requested = False
        self.asked_at: float | None = None
        """``time.monotonic()`` of the first request."""
        self.announce: Callable[[], None] = lambda: None
        """Tells the other processes of the gang. Set once they can be reached."""
        self._leave: Callable[[str], None] | None = None
        self._deferred = False
        self._lock = threading.Lock()

    def install(self, leave: Callable[[str], None]) -> None:
        """Takes over SIGTERM and SIGINT. Only in the main thread.

        ``leave`` ends the process with a message. It is called from another thread, and does not return.
        """
        self._leave = leave
        waker, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(waker,), name="signals", daemon=True).start()

    def request(self, reason: str) -> None:
        """Notes a request and tells the gang. Ends the process unless that is deferred. A second one is ignored."""
        with self._lock:
            first = not self.requested
            self.note()
            at_once = not self._deferred and self._leave is not None
        if at_once and self._leave is not None:
            self._leave(f"asked to stop by {reason} outside the training loop, where there is nothing more to save")
        elif first:
            sys.stderr.write(f"asked to stop by {reason}; it is done when what is under way is saved\n")
            sys.stderr.flush()
            self.announce()

    def note(self) -> None:
        """Only notes a request, such as one that was found by a vote."""
        if not self.requested:
            self.asked_at = time.monotonic()
            self.requested = True

    def check(self) -> None:
        """Raises StoppedError if a request was noted."""
        if self.requested:
            raise StoppedError("asked to stop after the last step, whose checkpoint is complete")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, a request is noted and nothing more."""
        with self._lock:
            self._deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False

    def _listen(self, waker: int) -> None:
        while True:
            for number in os.read(waker, 64):
                if number in SIGNALS:
                    self.request(signal.Signals(number).name)

"""What the training processes print, on its way to the pod's log: nothing in it can pass for a progress line.

The operator believes the progress lines of rank 0's log, and a log mixes all that anything in the pod prints: records,
sample answers, warnings of libraries, on standard output and standard error alike. So the training processes have
neither. Progress goes through a pipe of its own, which only ``progress`` knows; all the rest goes through another one,
where ``{"lora"`` loses its form. Lines reach the log whole, so that none begins in the middle of another. The last ones
of each process are kept: a library that ends it says why there, and nowhere else.

One thread: the launcher pumps while it waits for the training processes.
"""

import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lora_api.messages import PROGRESS_START
from lora_trainer.settings import PROGRESS_DESCRIPTOR

MAX_LINE = 16 * 1024
"""Bytes of a line that are kept. The operator reads some hundred lines of a log at a time, and holds them in memory."""

KEPT_LINES = 300
KEPT_BYTES = 1024
"""So much is kept of the end of what a process prints. An abort in torch prints its stack twice, 60 lines each."""

PIECE = 64 * 1024
DRAIN_SECONDS = 2.0
"""How long what is left in the pipes may take at the end, where something else still writes into them."""

_START = PROGRESS_START.encode()
_HARMLESS = _START.replace(b"{", b"{ ", 1)


@dataclass(frozen=True)
class Channels:
    """Write ends of two pipes for one training process: ``output`` is its standard output and standard error."""

    output: int
    progress: int
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    """The end of what it printed, as far as it was passed on."""

    @property
    def environment(self) -> dict[str, str]:
        """Tells the process where its progress goes."""
        return {PROGRESS_DESCRIPTOR: str(self.progress)}


class Lines:
    """Cuts what comes out of one pipe into lines; those that are not ``trusted`` are made harmless."""

    def __init__(self, *, trusted: bool, kept: deque[str] | None = None) -> None:
        self._trusted, self._kept = trusted, kept
        self._held = bytearray()
        self._lost = 0

    def feed(self, data: bytes) -> bytes:
        """The lines that ``data`` completes."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            self._hold(end)
            lines.append(self._take())
        self._hold(rest)
        return b"".join(lines)

    def close(self) -> bytes:
        """The line that was begun, if there is one."""
        return self._take() if self._held else b""

    def _hold(self, piece: bytes) -> None:
        room = MAX_LINE - len(self._held)
        self._held += piece[:room]
        self._lost += max(0, len(piece) - room)

    def _take(self) -> bytes:
        line = bytes(self._held) if self._trusted else bytes(self._held).replace(_START, _HARMLESS)
        if self._kept is not None:
            self._kept.append(line[:KEPT_BYTES].decode(errors="replace"))
        mark = b" ... and %d bytes more" % self._lost if self._lost else b""
        self._held.clear()
        self._lost = 0
        return line + mark + b"\n"


class Relay:
    """The pipes of all training processes of this pod, and the way from there to standard output."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    @contextmanager
    def channels(self) -> Iterator[Channels]:
        """Pipes for a process that is started inside; afterwards only that process has their write ends."""
        (output, output_write), (progress, progress_write) = os.pipe(), os.pipe()
        channels = Channels(output_write, progress_write)
        self._selector.register(output, selectors.EVENT_READ, Lines(trusted=False, kept=channels.last_lines))
        self._selector.register(progress, selectors.EVENT_READ, Lines(trusted=True))
        try:
            yield channels
        finally:
            os.close(output_write)
            os.close(progress_write)

    def pump(self, seconds: float) -> bool:
        """Passes on what there is, or comes within ``seconds``; returns whether there was anything."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            data = os.read(key.fd, PIECE)
            self._write(key.data.feed(data) if data else self._end(key))
        return bool(ready)

    def drain(self) -> None:
        """Passes on what ended processes have left, and closes the pipes."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and self.pump(0):
            pass
        for key in list(self._selector.get_map().values()):
            self._write(self._end(key))

    def _end(self, key: selectors.SelectorKey) -> bytes:
        self._selector.unregister(key.fd)
        os.close(key.fd)
        rest: bytes = key.data.close()
        return rest

    def _write(self, text: bytes) -> None:
        if text:
            sys.stdout.flush()
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

"""The progress bar of a run, from the resource's status alone."""

import sys
from typing import TextIO

from lora_api import LoRAFineTuneStatus

WIDTH = 28


def format_bar(status: LoRAFineTuneStatus) -> str:
    """One line: phase, bar, step, loss, speed and time left, as far as they are known."""
    phase = status.phase or "Pending"
    progress = status.progress
    if progress is None or not progress.total_steps:
        reason = status.reason if status.reason and status.reason != phase else ""
        return f"{phase:<10} {reason}".rstrip()
    done = round(WIDTH * progress.step / progress.total_steps)
    parts = [
        f"{phase:<10} [{'#' * done}{'-' * (WIDTH - done)}] {progress.step}/{progress.total_steps} {progress.summary}",
        f"loss {progress.loss:.4f}" if progress.loss is not None else "",
        f"{progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second is not None else "",
        f"ETA {progress.eta}" if progress.eta else "",
    ]
    return "  ".join(part for part in parts if part)


class LiveLine:
    """Shows the newest of many lines: in place on a terminal, else one under the other, each only once."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._shown = ""

    def show(self, line: str) -> None:
        """Replaces the line."""
        if line == self._shown:
            return
        if self._stream.isatty():
            self._stream.write("\r\x1b[K    " + line)
        else:
            self._stream.write("    " + line + "\n")
        self._stream.flush()
        self._shown = line

    def end(self) -> None:
        """Leaves the last line standing."""
        if self._shown and self._stream.isatty():
            self._stream.write("\n")
            self._stream.flush()

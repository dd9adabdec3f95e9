"""What a person sees: progress lines, bounded waits, and errors that show the right log."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

_STARTED = time.monotonic()
_POLL_SECONDS = 0.05
_TAIL_LINES = 15
T = TypeVar("T")


class DevclusterError(Exception):
    """Something a person can act on; its text is shown as it is, without a traceback."""


def say(message: str) -> None:
    """Print one progress line with the seconds since the start, on standard error."""
    print(f"==> [{time.monotonic() - _STARTED:.1f}s] {message}", file=sys.stderr, flush=True)


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log, indented, and where all of it is."""
    try:
        # A log may hold gigabytes: read its end only.
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return f"(no log was written at {log})"
    shown = "\n".join("    " + line for line in text.splitlines()[-lines:])
    return f"last lines of {log}:\n{shown or '    (empty)'}"


def run_logged(
    what: str,
    argv: Sequence[str | os.PathLike[str]],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> None:
    """Run a command with its output in ``log``; raise :class:`DevclusterError` if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise DevclusterError(f"{what}: not done after {timeout:.0f} s; {tail(log)}") from None
    if done.returncode != 0:
        raise DevclusterError(f"{what}: exit code {done.returncode}; {tail(log)}")


def wait_for(
    what: str,
    probe: Callable[[], T | None],
    timeout: float,
    *,
    log: Path | None = None,
    failed: Callable[[], str | None] = lambda: None,
) -> T:
    """Call ``probe`` until it returns something true, and return that.

    ``failed`` may end the wait early with the reason why waiting is pointless (a process
    that is gone). Raises :class:`DevclusterError`, which names what was waited for.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        reason = failed()
        if reason is None and time.monotonic() > deadline:
            reason = f"not so after {timeout:.0f} s"
        if reason is not None:
            raise DevclusterError(f"waiting for {what}: {reason}" + (f"; {tail(log)}" if log else ""))
        time.sleep(_POLL_SECONDS)

"""The surroundings of ``lora_trainer sweep``: which runs are alive, what is said, and the exit code."""

import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from lora_api.failures import RULES
from lora_trainer.errors import BadSpecError, TrainerError
from lora_trainer.store import Store
from lora_trainer.sweep import describe_deleted, describe_kept, find_remains, sweep

ENDED = frozenset({"Failed", "Succeeded"})
"""Phases of runs whose checkpoints are kept for no longer than those of a deleted one."""

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,127}")
PROBE = ".sweep-probe"


def run_sweep(uri: str, alive: str, hours: int, *, dry: bool, allow_empty: bool) -> int:
    """Deletes the expired checkpoints below the store ``uri`` whose run is not alive. Returns the exit code.

    ``alive`` is a file as ``read_alive`` takes it, or - for standard input. ``dry``: only says what it would do.
    """
    did = "would delete" if dry else "deleted"
    try:
        uids = read_alive(sys.stdin.read() if alive == "-" else _read(Path(alive)), allow_empty=allow_empty)
        store = Store(uri)
        everything = find_remains(store.listing())
        remains = [one for one in everything if one.uid not in uids]
        now = datetime.now(UTC) if dry or not remains else store.now(PROBE)
        deleted = kept = freed = 0
        for one, keeping, gone in sweep(store, remains, now, hours, dry=dry):
            if gone:
                deleted, freed = deleted + 1, freed + one.size
                _say(f"{did} {describe_deleted(store, one, keeping)}")
            else:
                kept += 1
                _say(f"kept {describe_kept(store, one, keeping)}")
    except TrainerError as error:
        sys.stderr.write(f"{error.failure_class.value}: {error}\n")
        return RULES[error.failure_class].exit_code or 1
    living = len(everything) - len(remains)
    _say(
        f"{len(everything)} runs have checkpoints in {store.uri}: {did} those of {deleted} ({freed / 1e6:,.1f} MB), "
        f"kept those of {kept} that are not alive and have not expired, and of {living} that are alive"
    )
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpecError(f"--alive: {file}: {error}") from error


def read_alive(text: str, *, allow_empty: bool = False) -> set[str]:
    """The uids of runs that are alive, from lines of a uid and, behind a blank, the run's phase, if it has one.

    Raises:
        BadSpecError: something else is in it, or nothing: a listing that failed must not make all runs dead.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for number, words in enumerate(lines, start=1):
        if len(words) > 2 or not _UID.fullmatch(words[0]):
            raise BadSpecError(f"--alive: line {number} is not a uid, or a uid and a phase: {' '.join(words)[:100]}")
    if not lines and not allow_empty:
        raise BadSpecError("--alive: there is no run in it; if that is so, give --allow-empty")
    return _living(lines)


def _living(lines: Iterable[list[str]]) -> set[str]:
    return {words[0] for words in lines if ENDED.isdisjoint(words[1:])}

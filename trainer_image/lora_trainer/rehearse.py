"""Reads packed files once in a process of its own, whose memory is limited: ``python -m lora_trainer.rehearse``.

A Parquet or Arrow file of some kilobytes may unpack to any size: compressed pages, a dictionary that rows refer to
again and again, lengths that are lies. Arrow asks for what it is told to, so the one limit that holds is the kernel's.
What comes through here can be read by the training processes in the same memory.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_trainer.errors import BadDataError
from lora_trainer.inside import find_problem

MEMORY = 1024 * 1024 * 1024
"""Bytes that reading may need: many times what a batch of the longest records has."""

_PARQUET, _ARROW = b"PAR1", b"ARROW1"
_LENGTH = 4
_BAD = 65


def rehearse(files: Sequence[Path]) -> None:
    """Reads those of ``files`` that are packed in another process.

    Raises:
        BadDataError: one is not what its name says, or cannot be read in MEMORY.
    """
    packed = [str(file) for file in files if file.suffix in _CHECKS]
    for name in packed:
        _check_ends(Path(name))
    if not packed:
        return
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve far more addresses than they use
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, "-P", "-m", "lora_trainer.rehearse"]
    done = subprocess.run(
        command,
        env=environment,
        input=json.dumps(packed),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        *_, last = done.stdout.splitlines() or packed
        if done.returncode == _BAD:
            raise BadDataError(json.loads(last))
        raise BadDataError(
            f"{Path(last).name}: cannot be read in {MEMORY // 2**20} MiB of memory: it unpacks to more, or is damaged. "
            "Write it with smaller row groups or batches, or as JSON lines"
        )


def _check_ends(file: Path) -> None:
    """Beginning and end of a file, which tell most damage at once."""
    problem = find_problem(file)
    if problem is not None:
        raise BadDataError(f"{file.name}: {problem}")
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        content.seek(max(0, size - 8))
        problem = _CHECKS[file.suffix](start, content.read(8), size)
    if problem is not None:
        raise BadDataError(f"{file.name}: {problem}")


def _check_parquet(start: bytes, end: bytes, size: int) -> str | None:
    """Layout: PAR1, pages, footer, length of the footer, PAR1 (github.com/apache/parquet-format, "File format")."""
    if not start.startswith(_PARQUET) or not end.endswith(_PARQUET) or size < 12:
        return "is not a Parquet file, or was cut"
    footer = int.from_bytes(end[:_LENGTH], "little")
    return (
        None if footer + 12 <= size else f"is not a Parquet file: its footer is said to have {footer} of {size} bytes"
    )


def _check_arrow(start: bytes, end: bytes, size: int) -> str | None:
    """A file begins with ARROW1, a stream with the length of a message, which newer ones mark with four 0xFF bytes."""
    if start.startswith(_ARROW):
        return None
    mark = start.removeprefix(b"\xff" * _LENGTH)[:_LENGTH]
    length = int.from_bytes(mark, "little")
    return None if len(mark) == _LENGTH and 0 < length < size else "is not an Arrow file"


_CHECKS = {".parquet": _check_parquet, ".arrow": _check_arrow}


def main() -> int:
    """In the other process. The last line that it writes is the file that it reads, or what is wrong with it."""
    import pyarrow as pa

    from lora_trainer.readers import read_file

    pa.set_cpu_count(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in json.load(sys.stdin):
        print(name, flush=True)  # noqa: T201
        try:
            for _ in read_file(Path(name)):
                pass
        except BadDataError as error:
            if isinstance(error.__cause__, MemoryError):
                return 1
            print(json.dumps(str(error)), flush=True)  # noqa: T201
            return _BAD
        except MemoryError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

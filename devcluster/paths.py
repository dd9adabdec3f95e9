"""Where things are kept: a cache outside the checkout, so that a fresh clone starts warm."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devcluster.progress import say

REPOSITORY = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """Return the cache folder: ``$LORA_CACHE``, else ``~/.cache/lora-operator``."""
    chosen = os.environ.get("LORA_CACHE")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "lora-operator"


@contextmanager
def file_lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                say(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

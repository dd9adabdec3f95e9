"""Micro-batches that are made ahead: those of the next step while this one computes.

One thread, not loader processes. What makes a batch is reading mapped memory, NumPy, page-locking and the copy to the
GPU, and all of these let other threads run. Processes would have to be forked from one that has threads and a GPU, need
more shared memory than a pod has (/dev/shm holds 64 MB), and would have to be ended with it.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import torch


def start_maker(device: torch.device) -> ThreadPoolExecutor:
    """The thread that makes batches for ``device``. Page-locking would otherwise set up a context on the first GPU."""
    use = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=use)


class Ahead(Iterator[Any]):
    """The items of ``source``, of which at most ``block`` wait to be taken and ``block`` are being made.

    The first block is made by the caller: what an iterator draws from the global random number generators when it
    begins is drawn where it would be otherwise. A failure is raised when its block is asked for.
    """

    def __init__(self, source: Iterator[Any], block: int, maker: ThreadPoolExecutor) -> None:
        self.source = source
        self._block, self._maker = block, maker
        self._ready: deque[Any] = deque()
        self._coming: Future[list[Any]] | None = None

    def __next__(self) -> Any:
        """The next item, once it is made."""
        if not self._ready:
            self._ready.extend(self._make() if self._coming is None else self._coming.result())
            self._coming = self._maker.submit(self._make)
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def wait(self) -> None:
        """Returns when nothing is being made: an iterator that is at its end may still have to tidy up."""
        if self._coming is not None:
            self._coming.result()

    def _make(self) -> list[Any]:
        return list(islice(self.source, self._block))

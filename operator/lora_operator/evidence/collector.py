"""Reads what no watch shows, beside the looks at runs: a read that hangs holds up no look.

A look says what it wants (``wants``) and goes on with what is known. What is read changes the memory and wakes the run.
Kubelets are asked in a lane of their own, since any number of them may hang; the API server is asked in another.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from lora_api import LoRAFineTune
from lora_operator.evidence.hungnodes import HungNodes
from lora_operator.evidence.memory import Change, Memory
from lora_operator.evidence.reader import Reader
from lora_operator.evidence.wants import LastWordsOf, ProgressOf, Want
from lora_operator.kube.errors import KubeError
from lora_operator.objects import Key
from lora_operator.state.reports import hear_denied
from lora_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Longest wait for one read, in seconds: a run is looked at without it then."""

CONCURRENCY = 8
FORBIDDEN = 403


class Lane(StrEnum):
    """Who is asked."""

    KUBELETS = "kubelets"
    SERVER = "server"


@dataclass(frozen=True)
class _Request:
    run: LoRAFineTune
    epoch: int
    want: Want


_Ticket = tuple[Key, str]
"""A run, and what is read of it: it is read once at a time."""


class Collector:
    """Reads what looks ask for, each thing once at a time."""

    def __init__(
        self, reader: Reader, memory: Memory, wake: Callable[[Key], None], clock: Callable[[], datetime]
    ) -> None:
        self._reader = reader
        self._memory = memory
        self._wake = wake
        self._clock = clock
        self._nodes = HungNodes()
        self._open: dict[_Ticket, _Request] = {}
        self._queues = {lane: WorkQueue(self._read, CONCURRENCY) for lane in Lane}

    def start(self) -> None:
        """Begins to read."""
        for queue in self._queues.values():
            queue.start()

    async def stop(self, grace: float) -> None:
        """Reads no more."""
        await asyncio.gather(*(queue.stop(grace) for queue in self._queues.values()))

    def want(self, key: Key, run: LoRAFineTune, epoch: int, wants: Iterable[Want]) -> None:
        """Reads ``wants`` of ``run`` soon, but for what is being read already."""
        for want in wants:
            ticket = key, _name(want)
            if ticket not in self._open:
                self._open[ticket] = _Request(run, epoch, want)
                lane = Lane.KUBELETS if isinstance(want, ProgressOf | LastWordsOf) else Lane.SERVER
                self._queues[lane].wake(ticket)

    async def _read(self, ticket: _Ticket) -> None:
        request = self._open.get(ticket)
        if request is None:
            return
        key, metadata = ticket[0], request.run.metadata
        try:
            change = await self._try(request)
        finally:
            del self._open[ticket]
        if self._memory.add(key, metadata.uid, request.epoch, change):
            self._wake(key)

    async def _try(self, request: _Request) -> Change:
        """What was read, or that it could not be."""
        run, want, loop = request.run, request.want, asyncio.get_running_loop()
        node = want.pod.node if isinstance(want, ProgressOf | LastWordsOf) else ""
        if node and self._nodes.is_paused(node, loop.time()):
            return self._reader.build_unread(want, self._clock())
        try:
            async with asyncio.timeout(TIMEOUT):
                change = await self._reader.read(run, want)
        except (KubeError, TimeoutError) as error:
            return self._give_up(request, node, error)
        if node:
            self._nodes.saw_answer(node)
        return change

    def _give_up(self, request: _Request, node: str, error: KubeError | TimeoutError) -> Change:
        now, want = self._clock(), request.want
        silent = isinstance(error, TimeoutError) or error.status == 0
        if silent and node:
            self._nodes.saw_timeout(node, asyncio.get_running_loop().time())
        why = f"no answer within {TIMEOUT:.0f} s" if isinstance(error, TimeoutError) else str(error)
        logger.info("%s not read: %s", self._reader.describe(want), why)
        unread = self._reader.build_unread(want, now)
        denied = error.message if isinstance(error, KubeError) and error.status == FORBIDDEN else None
        if denied is None:
            return unread
        return lambda reports: hear_denied(unread(reports), self._reader.permission(want), denied, now)


def _name(want: Want) -> str:
    """What tells ``want`` from others of the same run."""
    return f"words of {want.pod.uid}" if isinstance(want, LastWordsOf) else type(want).__name__

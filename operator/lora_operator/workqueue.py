"""The keyed work queue: one look a key at a time, wake-ups coalesce, errors back off.

``Schedule`` is the pure core, with every time given to it; ``WorkQueue`` runs it on asyncio.
"""

import asyncio
import heapq
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar, cast

K = TypeVar("K", bound=Hashable)

logger = logging.getLogger(__name__)

BASE_DELAY = 0.5
MAX_DELAY = 120.0

LATE = 0.001
"""Seconds by which an alarm is late. uvloop counts in milliseconds, and one that is early is set again until it is not.
"""


class Schedule(Generic[K]):
    """Which key is due when. A key is in one of three states: idle, due at a time, or taken by a look."""

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._heap: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._taken: dict[K, float | None] = {}
        self._failures: dict[K, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def wake(self, key: K, at: float) -> None:
        """Makes ``key`` due at ``at``, or leaves it where it is due earlier. A taken key is due again once done."""
        if key in self._taken:
            again = self._taken[key]
            self._taken[key] = at if again is None else min(again, at)
            return
        due = self._due.get(key)
        if due is None or at < due:
            self._due[key] = at
            self._count += 1
            heapq.heappush(self._heap, (at, self._count, key))

    def ready(self, now: float) -> int:
        """How many keys are due at ``now``."""
        return sum(1 for due in self._due.values() if due <= now)

    def next_due(self) -> float | None:
        """When the next key is due, or ``None`` if none is."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> K | None:
        """A key that is due at ``now``, for the caller alone until ``done``."""
        due = self.next_due()
        if due is None or due > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._taken[key] = None
        return key

    def done(self, key: K, now: float, *, again_after: float | None = None) -> None:
        """Gives ``key`` back after success."""
        self._failures.pop(key, None)
        self._give_back(key, None if again_after is None else now + again_after)

    def failed(self, key: K, now: float) -> float:
        """Gives ``key`` back after an error; returns the seconds until the next try.

        Doubles from BASE_DELAY to MAX_DELAY, with up to half of it taken away at random, so that many keys that
        failed together do not come back together. Wake-ups from before the error wait with it, later ones do not.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(MAX_DELAY, BASE_DELAY * 2.0 ** min(failures, 30)) * (1.0 - self._jitter() / 2)
        self._taken[key] = None
        self._give_back(key, now + delay)
        return delay

    def _give_back(self, key: K, at: float | None) -> None:
        woken = self._taken.pop(key)
        times = [time for time in (woken, at) if time is not None]
        if times:
            self.wake(key, min(times))


class WorkQueue(Generic[K]):
    """Calls ``handle(key)`` for every key that is woken, ``concurrency`` at a time.

    ``handle`` returns the seconds after which it wants the key again, or ``None``. This is the one place where an
    unknown error is caught: it is logged, and the key is tried again later.

    One task gives out the keys, and workers that are there from the beginning look at them: a change wakes one of
    them. A task for each look would be taken for one of its own by kopf, which waits for those before it ends.
    """

    def __init__(self, handle: Callable[[K], Awaitable[float | None]], concurrency: int) -> None:
        self._handle = handle
        self._concurrency = concurrency
        self._schedule: Schedule[K] = Schedule()
        self._given: asyncio.Queue[K | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._workers: list[asyncio.Task[None]] = []
        self.busy_since: dict[K, float] = {}

    def __len__(self) -> int:
        return self._schedule.ready(self._now())

    def wake(self, key: K, after: float = 0.0) -> None:
        """Makes ``key`` due in ``after`` seconds. To be called in the queue's event loop."""
        self._schedule.wake(key, self._now() + after)
        self._changed.set()

    def start(self) -> None:
        """Begins to look at keys."""
        self._dispatcher = asyncio.create_task(self._dispatch(), name="dispatcher")
        self._workers = [
            asyncio.create_task(self._work(), name=f"reconcile worker {number}") for number in range(self._concurrency)
        ]

    async def caught_up(self) -> None:
        """Returns when every due key has been taken."""
        if len(self):
            self._idle.clear()
            await self._idle.wait()

    async def stop(self, grace: float) -> None:
        """Begins no more looks, and lets those that have begun finish, for ``grace`` seconds at most."""
        if self._dispatcher is None:
            return
        self._dispatcher.cancel()
        await asyncio.wait([self._dispatcher])
        for _ in self._workers:
            self._given.put_nowait(None)
        await asyncio.wait(self._workers, timeout=grace)
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            self._give_out()
            alarm, due = None, self._schedule.next_due()
            if due is None or due > self._now():
                self._idle.set()
            if due is not None and len(self.busy_since) < self._concurrency:
                alarm = loop.call_at(due + LATE, self._changed.set)
            await self._changed.wait()
            if alarm is not None:
                alarm.cancel()

    def _give_out(self) -> None:
        """Gives out as many keys as are due and may be looked at now."""
        while len(self.busy_since) < self._concurrency:
            key = self._schedule.take(self._now())
            if key is None:
                return
            self.busy_since[key] = self._now()
            self._given.put_nowait(key)

    async def _work(self) -> None:
        while (key := await self._given.get()) is not None:
            await self._look(key)
            del self.busy_since[key]
            self._changed.set()
            await asyncio.sleep(0)  # a look that calls nobody ends without a pause, and probes wait for one

    async def _look(self, key: K) -> None:
        try:
            again_after = await self._handle(key)
        except asyncio.CancelledError:
            if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise  # this worker is to end
            self._schedule.failed(key, self._now())
            logger.warning("%s: broken off", key)  # by kopf, which ends all that was begun at once when it ends
        except Exception:  # the boundary: see the class
            delay = self._schedule.failed(key, self._now())
            logger.exception("%s: failed, next try in %.1f s", key, delay)
        else:
            self._schedule.done(key, self._now(), again_after=again_after)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

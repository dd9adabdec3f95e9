"""The keyed work queue: one look a key at a time, wake-ups coalesce, errors back off.

``Schedule`` is the pure core, with every time given to it; ``WorkQueue`` runs it on asyncio.
"""

import asyncio
import heapq
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, NamedTuple, TypeVar, cast

K = TypeVar("K", bound=Hashable)

logger = logging.getLogger(__name__)

BASE_DELAY = 0.5
MAX_DELAY = 120.0

LATE = 0.001
"""Seconds by which an alarm is late. uvloop counts in milliseconds, and one that is early is set again until it is not.
"""


PATIENCE = 5.0
"""Most seconds for which a look that no change calls for lets others go first."""


class Turn(NamedTuple):
    """When a key is due, and until when others that are due may go first. ``number`` tells it from older turns."""

    at: float
    deadline: float
    number: int = 0


class Schedule(Generic[K]):
    """Which key is due when. A key is in one of three states: idle, due at a time, or taken by a look.

    Of the keys that are due the one with the earliest deadline comes first: what has just changed goes before what is
    looked at from time to time, but none waits for ever.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._later: list[tuple[float, int, K]] = []
        """By the time from which a key is due; with entries of turns that are no more, as in ``_ready``."""
        self._ready: list[tuple[float, int, K]] = []
        """By deadline: keys that were due when one was last taken."""
        self._turns: dict[K, Turn] = {}
        self._taken: dict[K, Turn | None] = {}
        self._failures: dict[K, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._turns)

    def wake(self, key: K, at: float, patience: float = 0.0) -> None:
        """Makes ``key`` due at ``at``, or leaves it where it is due earlier. A taken key is due again once done.

        For ``patience`` seconds it lets others go first.
        """
        if key in self._taken:
            self._taken[key] = _earlier(self._taken[key], Turn(at, at + patience))
            return
        known = self._turns.get(key)
        turn = _earlier(known, Turn(at, at + patience))
        if turn != known:
            self._count += 1
            self._turns[key] = turn = turn._replace(number=self._count)
            heapq.heappush(self._later, (turn.at, turn.number, key))

    def ready(self, now: float) -> int:
        """How many keys are due at ``now``."""
        return sum(1 for turn in self._turns.values() if turn.at <= now)

    def next_due(self) -> float | None:
        """When the next key is due, or ``None`` if none is."""
        self._forget_old_turns()
        heads = [self._turns[heap[0][2]].at for heap in (self._ready, self._later) if heap]
        return min(heads, default=None)

    def take(self, now: float) -> K | None:
        """A key that is due at ``now``, for the caller alone until ``done``."""
        self._forget_old_turns()
        while self._later and self._later[0][0] <= now:
            _, number, key = heapq.heappop(self._later)
            heapq.heappush(self._ready, (self._turns[key].deadline, number, key))
            self._forget_old_turns()
        if not self._ready:
            return None
        key = heapq.heappop(self._ready)[2]
        del self._turns[key]
        self._taken[key] = None
        return key

    def _forget_old_turns(self) -> None:
        """Takes away the first entries of both heaps whose key was taken, or has another turn by now."""
        for heap in (self._later, self._ready):
            while heap and ((turn := self._turns.get(heap[0][2])) is None or turn.number != heap[0][1]):
                heapq.heappop(heap)

    def done(self, key: K, now: float, *, again_after: float | None = None) -> None:
        """Gives ``key`` back after success."""
        self._failures.pop(key, None)
        self._give_back(key, None if again_after is None else _look_again(now, again_after))

    def failed(self, key: K, now: float) -> float:
        """Gives ``key`` back after an error; returns the seconds until the next try.

        Doubles from BASE_DELAY to MAX_DELAY, with up to half of it taken away at random, so that many keys that
        failed together do not come back together. Wake-ups from before the error wait with it, later ones do not.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(MAX_DELAY, BASE_DELAY * 2.0 ** min(failures, 30)) * (1.0 - self._jitter() / 2)
        self._taken[key] = None
        self._give_back(key, _look_again(now, delay))
        return delay

    def _give_back(self, key: K, again: Turn | None) -> None:
        turn = self._taken.pop(key)
        if again is not None:
            turn = _earlier(turn, again)
        if turn is not None:
            self.wake(key, turn.at, turn.deadline - turn.at)


def _look_again(now: float, after: float) -> Turn:
    """A turn that nothing calls for but time: who has waited long is not in a hurry."""
    return Turn(now + after, now + after + min(after, PATIENCE))


def _earlier(known: Turn | None, new: Turn) -> Turn:
    """``known``, or with the time and the deadline of ``new`` where these are earlier."""
    if known is None:
        return new
    return known._replace(at=min(known.at, new.at), deadline=min(known.deadline, new.deadline))


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

    def wake(self, key: K, after: float = 0.0, patience: float = 0.0) -> None:
        """Makes ``key`` due in ``after`` seconds; see ``Schedule.wake``. To be called in the queue's event loop."""
        self._schedule.wake(key, self._now() + after, patience)
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

"""Looks at the keys of the work queue, on a real loop."""

import asyncio
from collections.abc import Callable

import pytest
import uvloop

from lora_operator.manager.app import Operator
from lora_operator.settings import Settings
from lora_operator.workqueue import Schedule, WorkQueue


def test_looks_are_bounded_one_a_key_and_errors_are_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    active: list[str] = []
    most = 0
    calls: list[str] = []

    async def main() -> None:
        done = asyncio.Event()

        async def handle(key: str) -> float | None:
            nonlocal most
            assert key not in active
            active.append(key)
            most = max(most, len(active))
            await asyncio.sleep(0)
            active.remove(key)
            calls.append(key)
            if calls.count("broken") == 1 and key == "broken":
                raise RuntimeError("the first time it breaks")
            if set(calls) == {"a", "b", "c", "broken"} and calls.count("broken") == 2:
                done.set()
            return None

        queue = WorkQueue(handle, concurrency=2)
        queue.start()
        for key in ("broken", "a", "b", "c", "a"):
            queue.wake(key)
        await done.wait()
        await queue.stop(1.0)

    asyncio.run(main())
    assert most == 2
    assert "the first time it breaks" in caplog.text


def test_a_run_that_has_changed_is_looked_at_before_one_whose_log_was_read() -> None:
    looks: list[tuple[str, str]] = []

    async def main() -> None:
        async def handle(key: tuple[str, str]) -> float | None:
            looks.append(key)
            return None

        operator = Operator(Settings())
        operator._queue = queue = WorkQueue(handle, concurrency=1)
        operator._wake_patiently(("team", "old"))
        operator._wake(("team", "new"))
        queue.start()
        async with asyncio.timeout(10):
            await queue.caught_up()
        await queue.stop(1.0)

    asyncio.run(main())
    assert looks == [("team", "new"), ("team", "old")]


def test_stopping_lets_a_look_finish_and_then_ends_the_others() -> None:
    finished: list[str] = []

    async def main() -> None:
        started, release = asyncio.Event(), asyncio.Event()

        async def handle(key: str) -> float | None:
            started.set()
            await (release if key == "short" else asyncio.Event()).wait()
            finished.append(key)
            return None

        queue = WorkQueue(handle, concurrency=2)
        queue.start()
        queue.wake("short")
        queue.wake("endless")
        await started.wait()
        release.set()
        await queue.stop(0.1)

    asyncio.run(main())
    assert finished == ["short"]


def test_a_queue_has_caught_up_when_every_due_key_was_taken_though_one_is_still_worked_on() -> None:
    seen: list[int] = []

    async def main() -> None:
        async def handle(key: int) -> float | None:
            seen.append(key)
            await (asyncio.Event().wait() if key == 0 else asyncio.sleep(0))
            return None

        queue = WorkQueue(handle, concurrency=2)
        for key in range(50):
            queue.wake(key)
        queue.wake(99, after=60.0)
        queue.start()
        async with asyncio.timeout(10):
            await queue.caught_up()
            await queue.caught_up()  # at once
        await queue.stop(0.0)

    asyncio.run(main())
    assert sorted(seen) == list(range(50))


def test_a_queue_has_caught_up_though_every_place_is_taken() -> None:
    async def main() -> None:
        async def handle(_: int) -> float | None:
            await asyncio.Event().wait()
            return None

        queue = WorkQueue(handle, concurrency=2)
        queue.wake(1)
        queue.wake(2)
        queue.start()
        async with asyncio.timeout(10):
            await queue.caught_up()
        queue.wake(3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.caught_up(), 0.1)
        await queue.stop(0.0)

    asyncio.run(main())


def test_looks_that_never_wait_leave_others_their_turn() -> None:
    """Thousands of looks at a start call nobody, and a probe must be answered all the same."""

    async def main() -> None:
        looks, turns = 0, 0

        async def handle(_: int) -> float | None:
            nonlocal looks
            looks += 1
            return None

        queue = WorkQueue(handle, concurrency=2)
        for key in range(500):
            queue.wake(key)
        queue.start()
        while looks < 500:
            turns += 1
            await asyncio.sleep(0)
        await queue.stop(1.0)
        assert turns > 50

    asyncio.run(main())


async def turn(times: int = 5) -> None:
    """Lets everybody else have as many turns."""
    for _ in range(times):
        await asyncio.sleep(0)


def test_every_task_is_there_from_the_beginning_and_only_as_many_looks_begin_as_may() -> None:
    """kopf waits at its end for tasks that were made meanwhile, and cancels them."""

    async def main() -> None:
        release = asyncio.Event()

        async def handle(_: int) -> float | None:
            await release.wait()
            return None

        queue = WorkQueue(handle, concurrency=8)
        before = asyncio.all_tasks()
        queue.start()
        await turn()
        tasks = asyncio.all_tasks() - before
        for key in range(20):
            queue.wake(key)
            await turn()
            assert len(queue.busy_since) == min(key + 1, 8)
            assert asyncio.all_tasks() - before == tasks
        assert len(queue) == 12
        release.set()
        await turn(20)
        assert (len(queue), queue.busy_since, asyncio.all_tasks() - before) == (0, {}, tasks)
        await queue.stop(1.0)
        assert asyncio.all_tasks() == before

    asyncio.run(main())


def test_a_key_that_is_woken_while_it_is_looked_at_is_looked_at_again() -> None:
    async def main() -> None:
        looks = 0
        release = asyncio.Event()

        async def handle(_: str) -> float | None:
            nonlocal looks
            looks += 1
            await release.wait()
            return None

        queue = WorkQueue(handle, concurrency=2)
        queue.start()
        queue.wake("a")
        await turn()
        for _ in range(3):
            queue.wake("a")
            await turn()
        assert looks == 1
        release.set()
        await turn(20)
        assert looks == 2
        await queue.stop(1.0)

    asyncio.run(main())


def test_no_look_begins_once_the_queue_stops() -> None:
    seen: list[int] = []

    async def main() -> None:
        release = asyncio.Event()

        async def handle(key: int) -> float | None:
            seen.append(key)
            await release.wait()
            return 0.0

        queue = WorkQueue(handle, concurrency=2)
        for key in range(5):
            queue.wake(key)
        queue.start()
        await turn()
        stopping = asyncio.create_task(queue.stop(10.0))
        await turn()
        assert not stopping.done()
        queue.wake(0)
        release.set()
        await stopping
        await turn()

    asyncio.run(main())
    assert seen == [0, 1]


def test_a_queue_that_stops_before_its_first_turn_begins_nothing() -> None:
    async def main() -> None:
        async def handle(_: str) -> float | None:
            raise AssertionError

        queue = WorkQueue(handle, concurrency=2)
        await queue.stop(1.0)
        queue.wake("a")
        queue.start()
        await queue.stop(1.0)
        await turn()
        assert len(queue) == 1

    asyncio.run(main())


def test_a_look_that_is_cancelled_gives_its_place_and_its_key_back() -> None:
    seen: list[str] = []

    async def main() -> None:
        done = asyncio.Event()

        async def handle(key: str) -> float | None:
            seen.append(key)
            if seen == ["a"]:
                raise asyncio.CancelledError
            if seen.count("a") == 2:
                done.set()
            return None

        queue = WorkQueue(handle, concurrency=1)
        queue.start()
        queue.wake("a")
        queue.wake("b")
        async with asyncio.timeout(10):
            await done.wait()
        assert queue.busy_since == {}
        await queue.stop(1.0)

    asyncio.run(main())
    assert seen == ["a", "b", "a"]


PAUSE = 0.0103
"""Seconds between two looks: no whole number of the milliseconds in which uvloop counts."""


class CountingSchedule(Schedule[int]):
    asked = 0

    def next_due(self) -> float | None:
        self.asked += 1
        return super().next_due()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_queue_sleeps_until_a_key_is_due_or_a_look_ends(run: Callable[..., None]) -> None:
    async def main() -> None:
        looks = sleeps = 0

        async def handle(key: int) -> float | None:
            nonlocal looks
            looks += 1
            await (asyncio.Event().wait() if key == 0 else asyncio.sleep(0))
            return PAUSE

        async def sleep_on() -> None:
            nonlocal sleeps
            while True:
                await asyncio.sleep(PAUSE)
                sleeps += 1

        queue = WorkQueue(handle, concurrency=2)
        queue._schedule = schedule = CountingSchedule()
        for key in range(10):
            queue.wake(key, after=key / 777)
        loop = asyncio.get_running_loop()
        began = loop.time()
        sleepers = [asyncio.create_task(sleep_on()) for _ in range(9)]  # as often as the machine is quick
        queue.start()
        await asyncio.sleep(0.5)
        assert sleeps / 4 < looks <= 10 * ((loop.time() - began) / PAUSE + 1)
        for sleeper in sleepers:
            sleeper.cancel()
        assert schedule.asked < 8 * looks, "an alarm comes too early, again and again"
        full = WorkQueue(handle, concurrency=1)
        full._schedule = schedule = CountingSchedule()
        full.wake(0)
        full.wake(1)
        full.start()
        await asyncio.sleep(0.2)
        assert schedule.asked < 10, "there is room for no look"
        await queue.stop(0.0)
        await full.stop(0.0)

    run(main())

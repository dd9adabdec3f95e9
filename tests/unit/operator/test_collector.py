"""What is read beside the looks: each thing once at a time, without holding anything up."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import pytest

from lora_api import LoRAFineTune
from lora_operator.evidence import collector as module
from lora_operator.evidence.collector import Collector
from lora_operator.evidence.hungnodes import PAUSE, TIMEOUTS, HungNodes
from lora_operator.evidence.memory import Change, Memory
from lora_operator.evidence.reader import Reader
from lora_operator.evidence.wants import LastWordsOf, ProgressOf, RefusalOf, Want
from lora_operator.kube.errors import KubeError
from lora_operator.state.reports import Reports, forget_attempt
from tests.unit.operator.builders import NOW, a_job, a_run, running

RUN = a_run(status={"attempt": 1})
KEY = ("team", "tickets")


class Answers(Reader):
    """Reads what a test gives it, as slowly as it likes."""

    def __init__(self) -> None:
        self.given: dict[str, Callable[[], Any]] = {}
        self.asked: list[str] = []

    async def read(self, run: LoRAFineTune, want: Want) -> Change:
        """Reads from ``given``."""
        what = self.describe(want)
        self.asked.append(what)
        answer = self.given.get(what, lambda: "words")()
        if asyncio.iscoroutine(answer):
            answer = await answer
        return lambda reports: replace(reports, last_words={**reports.last_words, what: answer})


@dataclass
class World:
    """A collector, and what it has done."""

    memory: Memory = field(default_factory=Memory)
    reader: Answers = field(default_factory=Answers)
    woken: list[Any] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def make(self) -> Collector:
        def clock() -> datetime:
            return NOW

        return Collector(self.reader, self.memory, self.wake, clock)

    def wake(self, key: Any) -> None:
        self.woken.append(key)
        self.changed.set()

    def reports(self) -> Reports:
        return self.memory.get(KEY, "run-uid")


def play(story: Callable[[World, Collector], Any]) -> World:
    world = World()

    async def run() -> None:
        collector = world.make()
        collector.start()
        try:
            await asyncio.wait_for(story(world, collector), 10)
        finally:
            await collector.stop(0.0)

    asyncio.run(run())
    return world


async def woken(world: World, times: int = 1) -> None:
    while len(world.woken) < times:
        world.changed.clear()
        await world.changed.wait()


LOG, WORDS, EVENTS = ProgressOf(running(0, node="a")), LastWordsOf(running(0, node="a")), RefusalOf(a_job())


def test_what_is_read_is_remembered_and_wakes_the_run() -> None:
    async def story(world: World, collector: Collector) -> None:
        collector.want(KEY, RUN, 0, [EVENTS])
        await woken(world)

    world = play(story)
    assert world.woken == [KEY]
    assert world.reports().last_words == {"team/tickets-1: Events": "words"}


def test_one_thing_is_read_once_at_a_time() -> None:
    async def story(world: World, collector: Collector) -> None:
        going = asyncio.Event()
        world.reader.given["team/tickets-1: Events"] = going.wait
        for _ in range(5):
            collector.want(KEY, RUN, 0, [EVENTS])
            await asyncio.sleep(0.01)
        assert len(world.reader.asked) == 1
        going.set()
        await woken(world)
        collector.want(KEY, RUN, 0, [EVENTS])
        await woken(world, 2)

    assert len(play(story).reader.asked) == 2


def test_kubelets_that_hang_hold_up_no_call_to_the_api_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World, collector: Collector) -> None:
        never = asyncio.Event()
        pods = [replace(running(0, node=f"n{n}"), name=f"p{n}") for n in range(3 * module.CONCURRENCY)]
        for number, pod in enumerate(pods):
            world.reader.given[f"team/{pod.name}: log"] = never.wait
            collector.want(("team", f"other-{number}"), RUN, 0, [ProgressOf(pod)])
        collector.want(KEY, RUN, 0, [EVENTS])
        await woken(world)
        assert world.woken == [KEY]

    play(story)


def test_a_read_that_hangs_is_given_up_and_its_node_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.02)

    async def story(world: World, collector: Collector) -> None:
        world.reader.given["team/tickets-1-0: log"] = asyncio.Event().wait
        for number in range(TIMEOUTS + 2):
            collector.want(KEY, RUN, 0, [LOG])
            await woken(world, number + 1)

    world = play(story)
    assert len(world.reader.asked) == TIMEOUTS, "the last two were not asked for"
    assert world.reports().heard_at == NOW, "nobody knows whether the gang is silent"
    assert world.reports().log_read_at == NOW


def test_what_is_read_too_late_is_dropped() -> None:
    async def story(world: World, collector: Collector) -> None:
        going = asyncio.Event()
        world.reader.given["team/tickets-1: Events"] = going.wait
        collector.want(KEY, RUN, 0, [EVENTS])
        await asyncio.sleep(0.02)
        world.memory.change(KEY, "run-uid", forget_attempt)
        going.set()
        collector.want(("team", "other"), RUN, 0, [RefusalOf(a_job(name="other"))])
        await woken(world)

    world = play(story)
    assert world.woken == [("team", "other")]
    assert world.reports() == Reports(run_uid="run-uid", epoch=1)


@pytest.mark.parametrize(("status", "denied"), [(403, {"list events": "forbidden: may not"}), (500, {}), (0, {})])
def test_what_is_not_allowed_is_remembered_as_such(status: int, denied: dict[str, str]) -> None:
    async def story(world: World, collector: Collector) -> None:
        async def refuse() -> None:
            raise KubeError(status, "forbidden: may not")

        world.reader.given["team/tickets-1: Events"] = refuse
        collector.want(KEY, RUN, 0, [EVENTS])
        await woken(world)

    world = play(story)
    assert {what: one.words for what, one in world.reports().denied.items()} == denied
    assert world.reports().refusal_read_at == NOW, "it is not asked again at once"


def test_last_words_that_cannot_be_read_are_none() -> None:
    async def story(world: World, collector: Collector) -> None:
        async def refuse() -> None:
            raise KubeError(500, "the node is gone")

        world.reader.given["team/tickets-1-0: log"] = refuse
        collector.want(KEY, RUN, 0, [WORDS])
        await woken(world)

    assert play(story).reports().last_words == {"pod-1-0": None}


def test_a_node_is_asked_again_after_a_while_and_gets_one_try() -> None:
    nodes = HungNodes()
    for _ in range(TIMEOUTS - 1):
        nodes.saw_timeout("a", 0.0)
    assert not nodes.is_paused("a", 0.0)
    nodes.saw_timeout("a", 0.0)
    assert nodes.is_paused("a", PAUSE - 1)
    assert not nodes.is_paused("b", 1.0)
    assert not nodes.is_paused("a", PAUSE)
    nodes.saw_timeout("a", PAUSE)
    assert nodes.is_paused("a", PAUSE + 1)
    nodes.saw_answer("a")
    assert not nodes.is_paused("a", PAUSE + 2)
    nodes.saw_timeout("a", PAUSE + 3)
    assert not nodes.is_paused("a", PAUSE + 4), "an answer begins the count anew"


def test_reports_of_another_run_of_the_name_are_none() -> None:
    memory = Memory()
    memory.change(KEY, "first", lambda reports: replace(reports, stage="training"))
    assert memory.get(KEY, "second") == Reports(run_uid="second")
    assert not memory.add(KEY, "second", 0, lambda reports: reports)
    assert memory.get(KEY, "first").stage == "training"

"""The ends of logs that go on record with a failure, and how long they are waited for."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from lora_api import Failure, FailureClass
from lora_operator.controller.finetunes import settle
from lora_operator.lifecycle.lastwords import CHARACTERS, PATIENCE, SPEAKERS, await_words, compute_log_tail
from lora_operator.state.observed import Observed
from lora_operator.state.plan import FailureRecord, Plan
from lora_operator.state.reports import Reports
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ago, ended, running, seen


def failed(failure_class: str = "Internal", pod: str | None = "tickets-1-1") -> Plan:
    words = {"attempt": 1, "class": failure_class, "reason": "X", "message": "m", "remedy": "r", "pod": pod, "at": NOW}
    return Plan(failed=FailureRecord(Failure.model_validate(words)), ended=True)


def of(*pods: Any, **reports: Any) -> Observed:
    return seen(a_run(status={"attempt": 1}), a_job(), *pods, reports=Reports(run_uid="run-uid", **reports))


@dataclass(frozen=True)
class Case:
    """``want``: the words on record, or the names of the pods that are to be heard first."""

    plan: Plan
    pods: tuple[Any, ...]
    want: str | list[str] | None
    reports: dict[str, Any] = field(default_factory=dict)


ENDED = (running(0), ended(1))
CASES = {
    "the log of the pod that failed is read first": Case(failed(), ENDED, ["tickets-1-1"]),
    "and goes on record": Case(failed(), ENDED, "boom", {"last_words": {"pod-1-1": "boom"}}),
    "one that cannot be read holds nothing up": Case(failed(), ENDED, None, {"last_words": {"pod-1-1": None}}),
    "nor does one that nobody reads in time": Case(failed(), ENDED, None, {"awaiting_since": ago(PATIENCE)}),
    "until then it is waited for": Case(failed(), ENDED, ["tickets-1-1"], {"awaiting_since": ago(PATIENCE - 1)}),
    "a pod that is gone has no log": Case(failed(), (running(0), ended(1, gone=True)), None),
    "nor has one that never ran": Case(failed(), (running(0), a_pod(1)), None),
    "a failure without a pod has none": Case(failed(pod=None), ENDED, None),
    "of a gang that stalled all that run are heard": Case(
        failed("Stalled", None), (running(0), running(1)), ["tickets-1-0", "tickets-1-1"]
    ),
    "but not all of a large one": Case(
        failed("Stalled", None), tuple(running(n) for n in range(64)), [f"tickets-1-{n}" for n in range(SPEAKERS)]
    ),
    "each with its name": Case(
        failed("Stalled", None), (running(0), running(1)), "tickets-1-0: a\ntickets-1-1: no log",
        {"last_words": {"pod-1-0": "a", "pod-1-1": None}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_last_words(name: str) -> None:
    case = CASES[name]
    plan = await_words(of(*case.pods, **case.reports), case.plan, NOW)
    if isinstance(case.want, list):
        assert [pod.name for pod in plan.notes.words_of] == case.want
        assert plan.failure is None, "nothing is on record yet"
        assert plan.requeue_after is not None
        assert plan.requeue_after > 0
    else:
        assert plan.failure is not None
        assert plan.failure.log_tail == case.want
        assert plan.ended


def test_the_wait_for_words_forgets_nothing_that_led_to_the_verdict() -> None:
    observed = of(*ENDED, failing_since=ago(5), short_of_room_since=ago(700))
    after = settle(observed.reports, observed, await_words(observed, failed(), NOW), NOW)
    assert (after.failing_since, after.short_of_room_since, after.awaiting_since) == (ago(5), ago(700), NOW)


def test_no_plan_without_a_failure_waits_for_words() -> None:
    plan = Plan(requeue_after=5.0)
    assert await_words(of(*ENDED), plan, NOW) is plan


def test_words_have_no_more_room_than_there_is() -> None:
    failure = failed("Stalled", None).failure
    assert failure is not None
    tail = compute_log_tail(failure, {f"tickets-1-{n}": "x" * CHARACTERS for n in range(SPEAKERS)})
    assert tail is not None
    assert len(tail) <= CHARACTERS
    assert tail.count("tickets-1-") == SPEAKERS


def as_go_writes(text: str) -> str:
    """JSON of ``text`` in an object of the API server: the characters of HTML are escaped, too."""
    written = json.dumps(text, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x07\x1b[31m",
        "\U0001f600",
        "\u4e2d\n",
        "a\x1b[0m\tb\n",
        "\udcff",
        "<",
        "<a href=x>&amp;</a>\n",
        '"\\',
        "\u2028",
    ],
)
@pytest.mark.parametrize("stalled", [False, True])
def test_a_log_of_anything_takes_no_more_room_than_one_of_letters(text: str, stalled: bool) -> None:
    kind = FailureClass.STALLED if stalled else FailureClass.INTERNAL
    words = text * CHARACTERS
    failure = Failure(attempt=1, failure_class=kind, message=words, pod=None if stalled else "tickets-1-0", at=NOW)
    tail = compute_log_tail(failure, {f"tickets-1-{n}": words for n in range(SPEAKERS)})
    for told in (tail, failure.message):
        assert len(as_go_writes(told or "").encode()) <= 4096 + 2, "with its quotes"
        assert not set(told or "") & {"\x00", "\x07", "\x1b"}

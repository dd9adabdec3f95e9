"""What follows a failure: what it uses up, how soon the next attempt comes, and when there is none."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from lora_api import RULES, Failure, FailureClass
from lora_operator.policies.restarts import judge, spread
from lora_operator.state.plan import Budget
from tests.unit.operator.builders import NOW, a_run, ago, condition, failure, stamp

DAY = 86_400
EVICTED, AUTH, STORE = FailureClass.EVICTED, FailureClass.AUTH_DENIED, FailureClass.STORE_UNAVAILABLE
PULL, UNSTARTED = FailureClass.IMAGE_PULL_FAILED, FailureClass.POD_NOT_STARTED
INTERNAL, NOT_PLACED = FailureClass.INTERNAL, FailureClass.NOT_PLACED
PASSED = {"conditions": [condition("PreflightPassed")]}
SAVED = {"lastCheckpoint": {"step": 12, "at": stamp(ago(500))}}


@dataclass(frozen=True)
class Case:
    """``budget``: what is used up then; ``ends``: as which class the run ends, ``None`` if it is restarted."""

    failure_class: FailureClass
    status: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    backoff: float | None = None
    ends: FailureClass | None = None
    said: str = ""


CASES = {
    "a failure of the run itself is charged": Case(INTERNAL, budget=Budget(1, 1, NOW), backoff=10.0),
    "so many as maxRestarts are restarted": Case(
        INTERNAL, {"chargedRestarts": 2, "recentFailures": 2, "failingSince": stamp(ago(60))},
        budget=Budget(3, 3, ago(60)), backoff=40.0,
    ),
    "one more ends the run": Case(
        INTERNAL, {"chargedRestarts": 3}, ends=INTERNAL, said="(after 3 of runPolicy.maxRestarts = 3 restarts)"
    ),
    "a newer checkpoint sets the count to 0": Case(
        INTERNAL, {"chargedRestarts": 3, "recentFailures": 3, **SAVED}, {"checkpoint": 24}, Budget(1, 1, NOW), 10.0
    ),
    "the one that is on record already does not": Case(
        INTERNAL, {"chargedRestarts": 3, **SAVED}, {"checkpoint": 12}, ends=INTERNAL
    ),
    "the first checkpoint of all is a newer one": Case(
        INTERNAL, {"chargedRestarts": 3}, {"checkpoint": 12}, Budget(1, 1, NOW), 10.0
    ),
    "the third time at one step is no accident": Case(
        INTERNAL, {"failures": [{**failure(number), "step": 40} for number in (1, 2)]}, {"step": 40}, ends=INTERNAL,
        said="the 3rd time in a row at step 40",
    ),
    "a node may be taken away at one step as often as it likes": Case(
        EVICTED, {"failures": [{**failure(number), "class": "Evicted", "step": 40} for number in (1, 2, 3)]},
        {"step": 40}, Budget(0, 1, NOW), 10.0,
    ),
    "failures before any step are at none": Case(
        INTERNAL, {"failures": [failure(number) for number in (1, 2, 3)]}, {}, Budget(1, 1, NOW), 10.0
    ),
    "nothing is charged to a gang that was not whole": Case(
        INTERNAL, {"chargedRestarts": 3}, {"incomplete": True}, Budget(3, 4, NOW), 80.0
    ),
    "an eviction is never charged": Case(
        EVICTED, {"chargedRestarts": 3, "recentFailures": 3}, budget=Budget(3, 4, NOW), backoff=80.0
    ),
    "nor is the hundredth": Case(
        EVICTED, {"recentFailures": 99, "failingSince": stamp(ago(DAY - 1))},
        budget=Budget(0, 100, ago(DAY - 1)), backoff=600.0,
    ),
    "but a day without a newer checkpoint is enough": Case(
        EVICTED, {"recentFailures": 99, "failingSince": stamp(ago(DAY))}, ends=FailureClass.NO_PROGRESS,
        said="ended as Evicted: it broke (for 1d00h, in 100 attempts)",
    ),
    "unless this attempt has completed one": Case(
        EVICTED, {"recentFailures": 99, "failingSince": stamp(ago(DAY))}, {"checkpoint": 12}, Budget(0, 1, NOW), 10.0
    ),
    "a gang that shrinks its micro-batch is not charged, and waits as well": Case(
        FailureClass.GPU_OUT_OF_MEMORY, {"recentFailures": 1}, {"shrinks": True}, Budget(0, 2, NOW), 20.0
    ),
    "one that does not ends": Case(FailureClass.GPU_OUT_OF_MEMORY, ends=FailureClass.GPU_OUT_OF_MEMORY),
    "room is waited for as long as it takes, each time longer": Case(
        NOT_PLACED, {"recentFailures": 5, "failingSince": stamp(ago(9 * DAY))},
        budget=Budget(0, 6, ago(9 * DAY)), backoff=320.0,
    ),
    "and waiting for it begins no day": Case(NOT_PLACED, budget=Budget(0, 1, None), backoff=10.0),
    "a key that was never right ends the run": Case(AUTH, ends=AUTH),
    "one with which the preflight passed may be rotated": Case(AUTH, PASSED, budget=Budget(0, 1, NOW), backoff=10.0),
    "and one with which a checkpoint was saved": Case(AUTH, SAVED, budget=Budget(0, 1, NOW)),
    "and one with which a checkpoint was saved just now": Case(AUTH, {}, {"checkpoint": 12}, Budget(0, 1, NOW)),
    "and one with which a step was done": Case(AUTH, {}, {"step": 7}, Budget(0, 1, NOW)),
    "and one with which a step was done before": Case(AUTH, {"progress": {"step": 7}}, budget=Budget(0, 1, NOW)),
    "it has a day for that": Case(AUTH, {**PASSED, "failingSince": stamp(ago(DAY))}, ends=AUTH, said="(for 1d00h"),
    "an image that was never pulled ends the run": Case(PULL, ends=PULL),
    "one that was may be away for a day": Case(
        PULL, {**PASSED, "recentFailures": 1, "failingSince": stamp(ago(DAY - 1))}, budget=Budget(0, 2, ago(DAY - 1)),
    ),
    "and no longer": Case(PULL, {**SAVED, "failingSince": stamp(ago(DAY))}, ends=PULL, said="(for 1d00h"),
    "what has lasted for a day has had it": Case(PULL, SAVED, {"since": ago(DAY)}, ends=PULL, said="(for 1d00h"),
    "what has lasted for less counts from its beginning": Case(
        UNSTARTED, SAVED, {"since": ago(600)}, Budget(0, 1, ago(600)), 10.0,
    ),
    "a model that was there once may be put back": Case(
        FailureClass.MODEL_NOT_FOUND, PASSED, budget=Budget(0, 1, NOW), backoff=10.0
    ),
    "one that nobody has seen ends the run": Case(
        FailureClass.MODEL_NOT_FOUND, ends=FailureClass.MODEL_NOT_FOUND
    ),
    "a pod that could never be made ends the run": Case(UNSTARTED, ends=UNSTARTED),
    "a store that is away is not charged": Case(
        STORE, {**PASSED, "chargedRestarts": 3, "recentFailures": 3, "failingSince": stamp(ago(1800))},
        budget=Budget(3, 4, ago(1800)), backoff=80.0,
    ),
    "it may be away for a day": Case(STORE, {**PASSED, "failingSince": stamp(ago(DAY))}, ends=STORE),
    "one that was never seen, for half an hour": Case(
        STORE, {"failingSince": stamp(ago(1800))}, budget=Budget(0, 1, ago(1800))
    ),
    "but not for more than an hour": Case(STORE, {"failingSince": stamp(ago(3600))}, ends=STORE),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_follows_a_failure(name: str) -> None:
    case = CASES[name]
    more = dict(case.more)
    failed = Failure(
        attempt=4, failure_class=case.failure_class, message="it broke", step=more.pop("step", None), at=NOW
    )
    verdict = judge(a_run(status={"attempt": 4, **case.status}), failed, NOW, base=10.0, **more)
    if case.ends is not None:
        assert not verdict.retried
        assert verdict.failure.failure_class is case.ends
        assert case.said in verdict.failure.message + verdict.refusal
        return
    assert verdict.retried
    assert verdict.failure.failure_class is case.failure_class
    assert verdict.budget == case.budget
    share = spread("run-uid", 4) if case.failure_class is NOT_PLACED else 1.0
    assert case.backoff is None or verdict.backoff == case.backoff * share
    assert verdict.charged == (case.failure_class is INTERNAL and "incomplete" not in case.more)


def test_a_key_that_is_waited_for_has_a_remedy_that_fits() -> None:
    failed = Failure(attempt=4, failure_class=AUTH, message="denied", remedy="create it again", at=NOW)
    waiting = judge(a_run(status=PASSED), failed, NOW, base=10.0)
    assert waiting.failure.remedy == RULES[AUTH].waiting_remedy
    over = judge(a_run(status={**PASSED, "failingSince": stamp(ago(DAY))}), failed, NOW, base=10.0)
    assert over.failure.remedy == "create it again"


def test_no_progress_names_where_the_last_attempt_ended() -> None:
    failed = Failure(
        attempt=4, failure_class=EVICTED, message="it broke", pod="tickets-4-1", node="n7", exit_code=137, at=ago(9)
    )
    found = judge(a_run(status={"failingSince": stamp(ago(DAY))}), failed, NOW, base=10.0).failure
    assert (found.attempt, found.pod, found.node, found.exit_code, found.at) == (4, "tickets-4-1", "n7", 137, ago(9))
    assert found.remedy == RULES[FailureClass.NO_PROGRESS].remedy


def test_gangs_that_gave_back_at_one_time_begin_again_at_others() -> None:
    shares = [spread(f"uid-{number}", attempt) for number in range(50) for attempt in (1, 2)]
    assert len(set(shares)) == 100
    assert min(shares) >= 0.5
    assert max(shares) <= 1.0
    assert max(shares) - min(shares) > 0.4


def test_no_pause_is_longer_than_ten_minutes() -> None:
    failed = Failure(attempt=4, failure_class=EVICTED, at=NOW)
    pauses = [
        judge(a_run(status={"recentFailures": n}), failed, NOW, base=10.0).backoff for n in (0, 1, 5, 6, 7, 10**9)
    ]
    assert pauses == [10.0, 20.0, 320.0, 600.0, 600.0, 600.0]

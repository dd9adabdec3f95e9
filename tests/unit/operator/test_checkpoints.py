"""Which checkpoint is complete, from what trainers of this version and of older ones say."""

import json
from typing import Any

import pytest

from lora_api import ConditionType, ProgressLine
from lora_operator.state.checkpoints import find_checkpoint, hear_checkpoint
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Mark, Plan
from lora_operator.state.reports import Reports
from lora_operator.status.compute import compute_status, is_progress_only
from tests.unit.operator.builders import NOW, a_run, ago, condition, ended, published, running, said, seen, stamp
from tests.unit.operator.test_status import RUNNING


def lines(*events: dict[str, Any]) -> list[ProgressLine]:
    return [ProgressLine.model_validate({"at": stamp(NOW), **event}) for event in events]


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "totalSteps": 100, **more}


LOADING = {"event": "stage", "stage": "loading"}
HEARD: dict[str, tuple[list[dict[str, Any]], int | None, int | None]] = {
    "none yet": ([LOADING, step(1), step(2)], None, None),
    "the newest that is told of": ([step(10, checkpointStep=8), step(17, checkpointStep=16)], None, 16),
    "what was known stays": ([step(18)], 16, 16),
    "an older one that an attempt goes on from": ([LOADING, step(9, checkpointStep=8)], 16, 16),
    "an older trainer that goes on from one": ([LOADING, step(13)], None, 12),
    "an older trainer whose beginning was not read": ([step(13)], None, None),
    "an older trainer that begins": ([LOADING, step(1)], None, None),
    "no log": ([], None, None),
    "a step that cannot be": ([step(3, checkpointStep=2**40)], None, None),
    "a checkpoint of nothing": ([step(3, checkpointStep=0)], None, None),
}


@pytest.mark.parametrize("name", HEARD)
def test_what_the_log_tells(name: str) -> None:
    said_lines, known, want = HEARD[name]
    assert hear_checkpoint(lines(*said_lines), known, 1) == want


def test_steps_that_are_not_logged_may_have_come_before() -> None:
    assert hear_checkpoint(lines(LOADING, step(20)), None, 10) == 10
    assert hear_checkpoint(lines(LOADING, step(10)), None, 10) is None


WORDS: dict[str, tuple[str, int | None]] = {
    "the newest": (said("Internal", step=30, checkpointStep=24), 24),
    "an older trainer that stopped with one": (said("Checkpointed", "asked to stop", step=9), 9),
    "one that was stopped before it had begun": (said("Checkpointed", "asked to stop before it had begun"), None),
    "one that speaks of it": (said("StoreUnavailable", "2 could not be saved; the last one is of step 40, and"), 40),
    "one that says that it is complete": (said("AuthDenied", "at step 24; that of step 12 is complete"), 12),
    "one that has none": (said("StoreUnavailable", "3 could not be saved; there is none yet: 503"), None),
    "a step is no checkpoint": (said("Internal", "it broke at step 30", step=30), None),
    "words that are not ours": ("not json", None),
    "success": (published(), None),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_the_last_words_tell(name: str) -> None:
    words, want = WORDS[name]
    observed = seen(
        a_run(status={"attempt": 1}), running(0), ended(1, 70, words), ended(0, 70, said("Internal"), attempt=2)
    )
    assert find_checkpoint(observed, 1) == want


def test_the_newest_of_all_counts() -> None:
    pods = [ended(0, 70, said("Internal", checkpointStep=8)), ended(1, 70, said("PeerLost", checkpointStep=16))]
    assert find_checkpoint(seen(a_run(), *pods, reports=Reports(checkpoint_step=12)), 1) == 16
    assert find_checkpoint(seen(a_run(), *pods, reports=Reports(checkpoint_step=20)), 1) == 20
    assert find_checkpoint(seen(a_run(), ended(0, 70, said("Internal", checkpointStep=8), attempt=2)), 1) is None


def test_the_words_of_a_newer_trainer_are_read_by_their_names() -> None:
    assert json.loads(lines(step(3, checkpointStep=2))[0].to_line())["lora"]["checkpointStep"] == 2


USED_UP = {"attempt": 2, "chargedRestarts": 2, "recentFailures": 5, "failingSince": stamp(ago(900))}
SAVED = {"lastCheckpoint": {"step": 12, "at": stamp(ago(950))}}


def status_of(plan: Plan, reports: Reports, **status: Any) -> Any:
    return compute_status(a_run(status={**USED_UP, **status}), plan, reports, NOW)


def test_a_newer_checkpoint_gives_back_what_was_used_up_while_the_gang_runs() -> None:
    new = status_of(RUNNING, Reports(checkpoint_step=24), **SAVED)
    assert (new.last_checkpoint.step, new.last_checkpoint.at) == (24, NOW)
    assert (new.charged_restarts, new.recent_failures, new.failing_since) == (0, None, None)


def test_one_that_is_known_gives_back_nothing() -> None:
    new = status_of(RUNNING, Reports(checkpoint_step=12), **SAVED)
    assert new.last_checkpoint.at == ago(950)
    assert (new.charged_restarts, new.recent_failures, new.failing_since) == (2, 5, ago(900))


def test_that_the_count_is_0_again_is_told_at_once() -> None:
    run = a_run(status={**USED_UP, "phase": "Running"})
    assert not is_progress_only(run.status, compute_status(run, RUNNING, Reports(checkpoint_step=24), NOW))


def test_a_suspension_ends_the_day_and_gives_back_no_restarts() -> None:
    plan = Plan(phase=RUNNING.phase, reason="Suspending", attempt=2, suspended=2)
    new = status_of(plan, Reports())
    assert (new.charged_restarts, new.recent_failures, new.failing_since) == (2, None, None)


@pytest.mark.parametrize(
    ("name", "before", "after", "since", "want"),
    [
        ("placed after a while: that does not count", "False", True, ago(300), ago(600)),
        ("only what this attempt has waited", "False", True, ago(10), ago(890)),
        ("not what it waited before anything failed", "False", True, ago(5000), NOW),
        ("still waiting", "False", False, ago(300), ago(900)),
        ("it has had its nodes all along", "True", True, ago(300), ago(900)),
        ("made by a clock that is ahead", "False", True, ago(-5), ago(900)),
    ],
)
def test_waiting_for_room_is_no_failing(name: str, before: str, after: bool, since: Any, want: Any) -> None:
    marks = {ConditionType.SCHEDULED: Mark(value=after, reason="x")}
    plan = Plan(phase=RUNNING.phase, reason="Running", attempt=2, conditions=marks, waiting_since=since)
    conditions = [condition("Scheduled", before, at=ago(4000))]
    assert status_of(plan, Reports(), conditions=conditions).failing_since == want, name


def test_an_observed_run_has_no_checkpoint_by_itself() -> None:
    assert find_checkpoint(Observed(run=a_run()), 1) is None

"""How long a gang that runs may be silent."""

from typing import Any

import pytest

from lora_operator.policies.stall import find_stall, seconds_to_stall
from lora_operator.state.reports import Reports
from tests.unit.operator.builders import NOW, a_run, ago, condition

RUNS = {"attempt": 1, "conditions": [condition("Running", at=ago(50))]}
CASES: dict[str, tuple[dict[str, Any], Reports, float | None]] = {
    "a gang that does not run is not silent": ({"attempt": 1}, Reports(heard_at=ago(900)), None),
    "one that never spoke has the time from when it ran": (RUNS, Reports(), 10.0),
    "one that spoke has it from there": (RUNS, Reports(heard_at=ago(5)), 55.0),
    "what was heard before it ran is of another attempt": (RUNS, Reports(heard_at=ago(900)), 10.0),
    "it is over": (
        RUNS | {"conditions": [condition("Running", at=ago(90))]},
        Reports(heard_at=ago(60), log_read_at=NOW),
        0.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_silence(name: str) -> None:
    status, reports, left = CASES[name]
    run = a_run(status=status, runPolicy={"stallTimeoutSeconds": 60})
    assert seconds_to_stall(run, reports, NOW) == left
    assert (find_stall(run, reports, 1, NOW) is not None) == (left == 0.0)


def test_the_failure_says_what_was_heard_last() -> None:
    status = {**RUNS, "conditions": [condition("Running", at=ago(90))], "progress": {"step": 7, "totalSteps": 18}}
    found = find_stall(
        a_run(status=status, runPolicy={"stallTimeoutSeconds": 60}),
        Reports(stage="evaluating", log_read_at=NOW),
        1,
        NOW,
    )
    assert found is not None
    assert found.message == "No word of progress for 60 s while evaluating; the last it said is step 7 of 18"
    assert found.step == 7


def test_no_gang_is_called_silent_before_a_last_look_at_its_log() -> None:
    run = a_run(status=RUNS, runPolicy={"stallTimeoutSeconds": 30})
    for reports, stalled in (
        (Reports(), False),
        (Reports(log_read_at=ago(21)), False),
        (Reports(log_read_at=ago(20)), True),
    ):
        assert (find_stall(run, reports, 1, NOW) is not None) is stalled

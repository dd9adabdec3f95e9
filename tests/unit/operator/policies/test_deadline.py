"""How long a gang may run, over all attempts."""

from typing import Any

import pytest

from lora_operator.policies.deadline import compute_active_seconds, find_overrun, seconds_to_deadline
from tests.unit.operator.builders import NOW, a_run, a_runtime, ago, condition

RUNS = {"conditions": [condition("Running", at=ago(30))]}
STOPPED = {"conditions": [condition("Running", "False", at=ago(30))]}
CASES: dict[str, tuple[dict[str, Any], int | None, int, float | None, bool]] = {
    "it never ran": ({}, 100, 0, 100.0, False),
    "it runs": (RUNS, 100, 30, 70.0, False),
    "it ran before, and runs": ({**RUNS, "activeSeconds": 60}, 100, 90, 10.0, False),
    "it ran before, and does not now": ({**STOPPED, "activeSeconds": 60}, 100, 60, 40.0, False),
    "the time is over": ({**RUNS, "activeSeconds": 70}, 100, 100, 1.0, True),
    "there is no deadline": ({**RUNS, "activeSeconds": 10**6}, None, 10**6 + 30, None, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_deadline(name: str) -> None:
    status, limit, active, left, over = CASES[name]
    run = a_run(status={"attempt": 2, **status}, runPolicy={"activeDeadlineSeconds": limit} if limit else {})
    assert compute_active_seconds(run.status, NOW) == active
    assert seconds_to_deadline(run, NOW) == left
    found = find_overrun(run, 2, NOW)
    assert (found is not None) == over
    assert found is None or "The pods have run for 1m40s, and runPolicy.activeDeadlineSeconds is 100" in found.message


def test_the_deadline_of_a_runtime_is_said_to_be_its_own() -> None:
    runtime = a_runtime("h100", limits={"maxActiveDeadlineSeconds": 100})
    taken = {"name": "h100", "spec": runtime.spec.to_wire()}
    run = a_run(status={"activeSeconds": 100, "runtime": taken}, runPolicy={"activeDeadlineSeconds": 100})
    found = find_overrun(run, 1, NOW)
    assert found is not None
    assert "the most that ClusterLoRARuntime h100 allows" in found.message

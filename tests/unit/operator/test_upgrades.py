"""What a run keeps that began under an older version."""

from typing import Any

import pytest

from lora_api import LoRAFineTuneStatus, Phase
from lora_operator.children.environment import find_left_out
from lora_operator.children.job import build_job, build_preflight_job
from lora_operator.settings import Settings
from lora_operator.state.plan import Plan
from lora_operator.state.reports import Reports
from lora_operator.state.upgrades import began_before_endpoints
from lora_operator.status.compute import compute_status
from tests.unit.operator.builders import NOW, a_run, condition, failure

SNAPSHOT = {"name": "default", "spec": {}}

# A sentence that says the case: the status, and whether the run began under an older version.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "a run that nobody has looked at": ({}, False),
    "a run that waits for its runtime": ({"phase": "Pending", "reason": "RuntimeNotFound"}, False),
    "a run that was suspended before it began": ({"phase": "Suspended"}, False),
    "an attempt of an older version": ({"phase": "Running", "attempt": 1}, True),
    "an older version's attempt that was suspended": ({"phase": "Suspended", "attempt": 1}, True),
    "an older version's first preflight": ({"phase": "Preflight"}, True),
    "an older version's preflight that failed": ({"phase": "Preflight", "failedPreflights": 1}, True),
    "an older version's preflight that passed": ({"conditions": [condition("PreflightPassed")]}, True),
    "a runtime that an older version took": ({"phase": "Pending", "runtime": SNAPSHOT}, True),
    "a runtime that this version took": ({"phase": "Pending", "runtime": SNAPSHOT, "listedKeys": True}, False),
    "an attempt of this version": ({"phase": "Running", "attempt": 1, "listedKeys": True}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_began_before(case: str) -> None:
    status, want = CASES[case]
    assert began_before_endpoints(LoRAFineTuneStatus.model_validate(status)) is want


@pytest.mark.parametrize("case", CASES)
def test_it_gets_the_endpoint_from_its_secret_and_nothing_else_does(case: str) -> None:
    status, want = CASES[case]
    run = a_run(status=status, credentials={"secretRef": {"name": "s"}})
    for job in (build_job(run, 2, Settings()), build_preflight_job(run, 2, Settings())):
        names = [entry["name"] for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]]
        assert ("AWS_ENDPOINT_URL" in names) is want


@pytest.mark.parametrize("case", CASES)
def test_it_keeps_the_hub_that_it_names_and_nothing_else_that_is_not_listed(case: str) -> None:
    status, want = CASES[case]
    env = [{"name": "HF_ENDPOINT", "value": "https://mirror"}, {"name": "HF_HOME", "value": "/mnt/pvc/planted"}]
    run = a_run(status=status, podTemplate={"env": env})
    for job in (build_job(run, 2, Settings()), build_preflight_job(run, 2, Settings())):
        container = job["spec"]["template"]["spec"]["containers"][0]
        found = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert (found.get("HF_ENDPOINT"), found["HF_HOME"]) == ("https://mirror" if want else None, "/scratch/hf")
    assert find_left_out(run) == (["HF_HOME"] if want else ["HF_ENDPOINT", "HF_HOME"])


@pytest.mark.parametrize("case", CASES)
def test_it_stays_so_to_the_end_of_the_run(case: str) -> None:
    status, want = CASES[case]
    run = a_run(status=status)
    for attempt in (1, 2, 3):
        new = compute_status(run, Plan(phase=Phase.RUNNING, reason="Running", attempt=attempt), Reports(), NOW)
        assert began_before_endpoints(new) is want
        run = a_run(status={**new.to_wire(), "failures": [failure(attempt)]})

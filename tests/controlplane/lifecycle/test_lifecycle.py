"""Whole lifecycles on a real API server and Job controller."""

import pytest

from tests.support.operators import OperatorThread
from tests.support.runs import ADAPTER, Run

pytestmark = pytest.mark.controlplane


def test_a_run_that_goes_well(run: Run, operator: OperatorThread) -> None:
    run.create()
    assert run.wait_phase("Starting")["attempt"] == 1
    run.set_running(1)
    run.wait_phase("Running")
    assert run.condition("Scheduled")["status"] == "True"
    run.set_succeeded(1)
    status = run.wait_phase("Succeeded")
    assert status["adapter"] == ADAPTER
    values = {item["type"]: item["status"] for item in status["conditions"]}
    assert values == {
        "Ready": "True",
        "Reconciling": "False",
        "Stalled": "False",
        "Scheduled": "True",
        "Running": "False",
        "Published": "True",
        "Complete": "True",
    }

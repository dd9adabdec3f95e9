"""What people read of a run that failed: with kubectl describe, and with kubectl get events."""

import json

import devcluster
from tests.controlplane.lifecycle.test_policy import line
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.support.wait import eventually

WHAT = "record 17 has no messages\nit has: question, answer"


def test_describe_says_a_failure_whole_in_one_condition_and_in_its_record(
    run: Run, cp: devcluster.ControlPlane, operator: OperatorThread
) -> None:
    operator.logs["run-1-1-"] = "".join(map(line, range(1, 60))) + "Traceback:\nValueError: broken\n"
    run.create()
    run.set_running(1)
    run.set_failed(1, "BadData", 65, WHAT)
    run.wait_phase("Failed")
    eventually("the Event of the end", lambda: [event for event in run.events() if event["action"] == "Fail"])
    text = cp.kubectl("describe", "lft", "run", f"--namespace={run.namespace}")
    assert text.count("record 17 has no messages") == 2, text
    assert "ValueError: broken" in text
    assert '{"lora"' not in text
    assert "record 17" in run.condition("Stalled")["message"]


def test_an_event_is_read_whole_in_one_line(run: Run, cp: devcluster.ControlPlane, operator: OperatorThread) -> None:
    run.create()
    run.set_running(1)
    run.set_failed(1, "Internal", 70, WHAT)
    run.wait("attempt 2", lambda status: status["attempt"] == 2)
    eventually("the Event of the restart", lambda: [event for event in run.events() if event["action"] == "Restart"])
    text = cp.kubectl("get", "events", f"--namespace={run.namespace}")
    assert "record 17 has no messages it has: question, answer" in text
    notes = [event["note"] for event in run.events()]
    assert all("\n" not in note for note in notes), json.dumps(notes)

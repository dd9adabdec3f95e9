"""What is said while something is waited for: never that there is nothing to do."""

from pathlib import Path
from typing import Any

import pytest

import lora_api
import lora_operator
from lora_api import RULES, FailureClass, Phase
from lora_operator.diagnosis.firstseen import LEFTOVERS
from lora_operator.diagnosis.obstacles import diagnose_refusal
from lora_operator.lifecycle.decide import decide
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan
from lora_operator.state.reports import Refusal, Reports
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ago, ended, failure, running, said, seen, waiting
from tests.unit.operator.cases import SETTINGS, STARTED

IDLE = "nothing to do"
RUN, JOB = a_run(status=STARTED), a_job()
FAILED = {"attempt": 1, "phase": "Restarting", "failures": [{**failure(1, "NodeLost"), "message": "it is away"}]}
LEAVING = running(0, deleting_at=ago(-100), node="n1")


def lasting(seconds: float) -> Reports:
    return Reports(seen={LEFTOVERS: ago(seconds)})


def unplaced(reason: str, words: str = "x") -> Observed:
    return seen(RUN, JOB, a_pod(0, unscheduled_reason=reason, unscheduled_message=words), a_pod(1))


def told(reports: Reports) -> Observed:
    return seen(RUN, JOB, waiting(0, "ContainerCreating"), a_pod(1), reports=reports)


WAITS: dict[str, Observed] = {
    "a gate": unplaced("SchedulingGated"),
    "room": unplaced("Unschedulable"),
    "a claim": unplaced("Unschedulable", 'persistentvolumeclaim "x" not found'),
    "an image": seen(RUN, JOB, waiting(0, "ImagePullBackOff"), a_pod(1)),
    "a Secret": seen(RUN, JOB, waiting(0, "CreateContainerConfigError"), a_pod(1)),
    "a sidecar": seen(RUN, JOB, waiting(0, "CrashLoopBackOff", init_container="mesh"), a_pod(1)),
    "a volume": told(Reports(pod_events={"pod-1-0": "FailedMount: x"})),
    "a network": told(Reports(pod_events={"pod-1-0": "FailedCreatePodSandBox: x"})),
    "a quota": told(Reports(refusal=Refusal("exceeded quota: few", NOW))),
    "a webhook": told(Reports(refusal=Refusal("failed calling webhook", NOW))),
    "a priority class": told(Reports(refusal=Refusal("no PriorityClass with name x", NOW))),
    "a policy": told(Reports(refusal=Refusal("violates PodSecurity", NOW))),
    "the pods of the last attempt": seen(a_run(status=FAILED), LEAVING, reports=lasting(6)),
}


def texts(plan: Plan) -> list[str]:
    return [plan.message, *(mark.message for mark in plan.conditions.values())]


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_says_what_it_is_for_and_what_to_do(name: str) -> None:
    plan = decide(WAITS[name], NOW, SETTINGS)
    assert (plan.failure, plan.phase is not None) == (None, True)
    assert plan.message
    assert not any(IDLE in text.lower() for text in texts(plan))
    assert any("Remedy: " in text or "waits for" in text for text in texts(plan))


@pytest.mark.parametrize("failure_class", [one for one in FailureClass if one in RULES])
def test_a_failure_that_restarts_says_what_follows(failure_class: FailureClass) -> None:
    pods = [ended(0, 70, said(str(failure_class))), ended(1, 73, said("PeerLost"))]
    plan = decide(seen(RUN, a_job(failed_indexes=frozenset({0, 1})), *pods), NOW, SETTINGS)
    assert plan.failure is not None
    assert not any(IDLE in text.lower() for text in [*texts(plan), RULES[failure_class].waiting_remedy])


@pytest.mark.parametrize(("kind", "status"), [("Job", code) for code in (400, 403, 413, 422, 500)])
def test_what_is_refused_says_what_to_do(kind: str, status: int) -> None:
    obstacle = diagnose_refusal(kind, "x", status, "the webhook says no", NOW)
    assert obstacle is not None
    assert obstacle.remedy
    assert IDLE not in obstacle.text.lower()


@pytest.mark.parametrize("module", [lora_api, lora_operator])
def test_no_text_says_so(module: Any) -> None:
    files = list(Path(module.__file__).parent.rglob("*.py"))
    assert files
    assert not [path.name for path in files if IDLE in path.read_text().lower()]


@pytest.mark.parametrize(
    ("status", "lasts", "phase", "message"),
    [
        (FAILED, 4, None, ""),
        (FAILED, 5, Phase.RESTARTING, "it is away. The next attempt waits for pod tickets-1-0 to end"),
        ({"attempt": 1, "suspendedAttempt": 1}, 5, Phase.RESTARTING, "The next attempt waits for pod tickets-1-0"),
    ],
    ids=["most end at once", "after a failure", "after a suspension"],
)
def test_the_pods_that_hold_up_the_next_attempt_are_named(
    status: dict[str, Any], lasts: float, phase: Phase | None, message: str
) -> None:
    plan = decide(seen(a_run(status=status), LEAVING, reports=lasting(lasts)), NOW, SETTINGS)
    assert (plan.phase, plan.actions) == (phase, ())
    assert plan.message.startswith(message)
    assert plan.requeue_after == (1.0 if phase is None else 100.0 + SETTINGS.failure_grace)

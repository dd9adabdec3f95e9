"""Calls other than a create that are refused: the status tells in whose words, and the rest of the run goes on."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.kube.client import KubeClient
from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_evidence import tells
from tests.support.operators import OperatorThread
from tests.support.runs import Run, termination
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

AWAY = 'Internal error occurred: failed calling webhook "jobs.example.org": context deadline exceeded'
KEEP = 'admission webhook "keep.example.org" denied the request: no deletes at night'


class Refusing:
    """An API server that refuses some calls, as long as it is told to."""

    def __init__(self, when: Callable[[str, str, Any], bool], status: int, words: str) -> None:
        self.on = True
        self._when = when
        self._answer = status, None, json.dumps({"kind": "Status", "message": words, "code": status}).encode()

    def __call__(self, client: KubeClient) -> None:
        send = client._send

        async def refuse(method: Any, path: str, *args: Any) -> Any:
            if self.on and self._when(method, path, args[0]):
                return self._answer
            return await send(method, path, *args)

        client._send = refuse  # type: ignore[method-assign]


def deletes_jobs(method: str, path: str, _: Any) -> bool:
    return method == "DELETE" and "/jobs/" in path


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_operator.lifecycle.refusals.FIRST_PAUSE", 0.5)


@pytest.mark.parametrize(
    ("status", "words", "reason"),
    [(500, AWAY, "WebhookFailed"), (400, KEEP, "CallRefused"), (403, KEEP, "CallRefused")],
)
def test_a_job_that_a_webhook_keeps_is_told_of_and_the_next_attempt_starts(
    run: Run, settings: Settings, status: int, words: str, reason: str
) -> None:
    server = Refusing(deletes_jobs, status, words)
    with OperatorThread(settings, wrap=server):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        run.set_ended(1, 1, 70, termination("Internal", "broke", rank=1))
        tells(run, f"{reason}: The API server does not let the operator delete jobs: {words}")
        assert "helm upgrade" not in run.condition("Ready")["message"]
        run.set_ended(1, 0, 73, termination("PeerLost", "closed", rank=0))
        run.set_running(2)
        run.wait_phase("Running")
        assert run.status["attempt"] == 2
        assert [job["metadata"]["name"] for job in run.jobs()] == ["run-1", "run-2"]
        server.on = False
        eventually("the old Job is deleted", lambda: [job["metadata"]["name"] for job in run.jobs()] == ["run-2"])
        eventually("and nothing is told any more", lambda: words not in run.condition("Ready").get("message", ""))


def test_pods_that_may_not_be_listed_hold_up_no_verdict(run: Run, settings: Settings) -> None:
    words = 'pods is forbidden: User "lora" cannot list resource "pods"'
    asked = Refusing(
        lambda method, path, query: method == "GET" and path.endswith("/pods") and "job-name" in str(query), 403, words
    )
    with OperatorThread(settings, wrap=asked):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        run.set_ended(1, 1, 73, termination("PeerLost", "closed", rank=1))
        run.wait("a verdict", lambda status: bool(status.get("failures")))
        assert run.status["failures"][0]["reason"] == "PeerSilent"
        tells(run, f"The operator may not list pods: {words}")


def test_a_status_that_may_not_be_written_is_told_of_by_an_event(run: Run, settings: Settings) -> None:
    server = Refusing(lambda method, path, _: method == "PATCH" and path.endswith("/status"), 400, KEEP)
    with OperatorThread(settings, wrap=server):
        run.create()
        found = lambda: [event for event in run.events() if event["reason"] == "StatusNotWritten"]  # noqa: E731
        eventually("an Event", found)
        assert KEEP in found()[0]["note"]
        server.on = False
        run.set_running(1)
        run.wait_phase("Running")

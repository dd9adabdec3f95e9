"""An API server that fails, is away or slow, clocks that jump, hands that meddle: no run is lost or made twice."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import yaml

import devcluster
from lora_operator.clock import utc_now
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError
from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_interruptions import check_end, jobs_created, live
from tests.support.api import Api
from tests.support.install import CRDS
from tests.support.operators import OperatorThread
from tests.support.runs import Run, termination
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

Answer = tuple[int, float | None, bytes]
BUSY = b'{"message": "the server has received too many requests"}'
FAULTS: dict[str, Answer | None] = {
    "refused": (500, None, b'{"message": "etcdserver: request timed out"}'),
    "unavailable": (503, None, b'{"message": "apiserver is shutting down"}'),
    "throttled": (429, 0.1, BUSY),
    "conflict": (409, None, b'{"message": "the object has been modified"}'),
    "no answer": None,
    "lost answer": None,
}


class Faulty:
    """Makes the first call of each kind (method and resource) fail; what it fails with, says ``fault``."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.hit: list[str] = []

    def wrap(self, client: KubeClient) -> None:
        send = client._send

        async def faulty(method: Any, path: str, *args: Any) -> Answer:
            kind = f"{method} {_kind(path)}"
            if kind in self.hit or (self.fault == "conflict" and method == "GET"):
                return await send(method, path, *args)
            self.hit.append(kind)
            if self.fault == "lost answer":
                await send(method, path, *args)
            answer = FAULTS[self.fault]
            if answer is None:
                raise KubeError(0, f"{kind}: no answer")
            return answer

        client._send = faulty  # type: ignore[method-assign]


def _kind(path: str) -> str:
    """The resource, and the subresource if it is one."""
    found = re.search(r"/namespaces/[^/]+/(\w+)(?:/[^/]+)?(/\w+)?$", path)
    return "".join(filter(None, found.groups())) if found else path


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_call_may_fail(
    run: Run, settings: Settings, cp: devcluster.ControlPlane, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("lora_operator.watched.fill.DELAYS", (0.1,) * 6)
    faulty = Faulty(fault)
    with OperatorThread(settings, wrap=faulty.wrap):
        run.create()
        live(run)
        check_end(run)
    assert jobs_created(cp, run.namespace) == ["run-1", "run-2"]
    writes = {"POST services", "POST networkpolicies", "POST jobs", "PATCH lorafinetunes/status"}
    assert writes | {"DELETE jobs"} <= set(faulty.hit)
    assert "POST events" in faulty.hit
    reads = {"GET pods/log", "GET pods", "GET jobs", "GET lorafinetunes", "GET networkpolicies", "GET services"}
    assert fault == "conflict" or reads <= set(faulty.hit)


def test_a_run_that_cannot_be_written_any_more_says_so_and_goes_on_once_it_can(
    run: Run, settings: Settings, cp: devcluster.ControlPlane
) -> None:
    """A CRD that became stricter, on Kubernetes before 1.30 or with its feature gate off."""
    refused = [True]
    words = b'{"message": "LoRAFineTune \\"run\\" is invalid: spec.podTemplate.env[0].name: Invalid value"}'

    def refuse(client: KubeClient) -> None:
        send = client._send

        async def sent(method: Any, path: str, *args: Any) -> Answer:
            if refused[0] and (method, _kind(path)) == ("PATCH", "lorafinetunes/status"):
                return 422, None, words
            return await send(method, path, *args)

        client._send = sent  # type: ignore[method-assign]

    with OperatorThread(settings, wrap=refuse):
        run.create()
        [told] = eventually("an Event", lambda: [one for one in run.events() if one["reason"] == "StatusRefused"])
        assert "Remedy: delete this LoRAFineTune" in told["note"]
        assert "spec.podTemplate.env[0].name" in told["note"]
        assert run.status == {}
        refused[0] = False
        run.api.patch(f"{run.path}/{run.name}", {"metadata": {"labels": {"look": "again"}}})
        live(run)
        check_end(run)
    assert jobs_created(cp, run.namespace) == ["run-1", "run-2"]


def test_what_the_pods_need_is_made_at_once_and_the_job_after_it(run: Run, settings: Settings) -> None:
    """Each of the two is answered only once the other is asked for."""
    together = {"networkpolicies", "services"}
    asked, answered = set[str](), list[str]()

    def hold(client: KubeClient) -> None:
        send = client._send

        async def held(method: Any, path: str, *args: Any) -> Answer:
            kind = _kind(path)
            if method == "POST" and kind in together:
                asked.add(kind)
                async with asyncio.timeout(20):
                    while asked != together:  # noqa: ASYNC110  (two calls of one launch)
                        await asyncio.sleep(0.01)
            answer = await send(method, path, *args)
            answered.extend([kind] if method == "POST" else [])
            return answer

        client._send = held  # type: ignore[method-assign]

    with OperatorThread(settings, wrap=hold):
        run.create()
        run.wait_phase("Starting")
    assert set(answered[:2]) == together
    assert answered[2] == "jobs"


@pytest.mark.parametrize("change", ["deleted", "written to"])
def test_nothing_more_is_made_of_a_run_that_changes_during_a_long_call(
    run: Run, settings: Settings, cp: devcluster.ControlPlane, change: str
) -> None:
    """What to make was decided before. Of a run that is gone, a Job would run until the garbage collector sees it."""
    seen = threading.Event()

    def hold(client: KubeClient) -> None:
        send = client._send

        async def held(method: Any, path: str, *args: Any) -> Answer:
            answer = await send(method, path, *args)
            if (method, _kind(path)) == ("POST", "services"):
                await asyncio.to_thread(seen.wait, 30)
            return answer

        client._send = held  # type: ignore[method-assign]

    with OperatorThread(settings, wrap=hold) as operator:
        run.create()
        eventually("its Service", run.services)
        cache, name, before = operator.operator.cache, f"{run.path}/{run.name}", run.raw["metadata"]["resourceVersion"]
        if change == "deleted":
            run.api.delete(name)
        else:
            run.api.patch(name, {"metadata": {"annotations": {"a": "b"}}})
        key = (run.namespace, run.name)
        eventually(
            "the operator knows", lambda: (cache.run(key) or {}).get("metadata", {}).get("resourceVersion") != before
        )
        seen.set()
        if change == "written to":
            run.wait_phase("Starting")
    posts = [call for call in operator.calls if call.startswith("POST") and call.endswith("/jobs")]
    assert len(posts) == (0 if change == "deleted" else 1)
    assert jobs_created(cp, run.namespace) == ["run-1"] * len(posts)


def test_watches_begin_though_the_first_looks_hang(
    api: Api, run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers wait for an answer that never comes, and a third run is due."""
    monkeypatch.setattr("lora_operator.manager.app.FIRST_LOOKS_SECONDS", 1.0)
    for name in ("first", "second", "third"):
        Run(api, run.namespace, name).create()

    hung = set[str]()

    def hang(client: KubeClient) -> None:
        send = client._send

        async def hanging(method: Any, path: str, *args: Any) -> Answer:
            if method == "POST":
                hung.add(path)
                await asyncio.get_running_loop().create_future()
            return await send(method, path, *args)

        client._send = hanging  # type: ignore[method-assign]

    operator = OperatorThread(settings, wrap=hang)
    operator.operator.drain_seconds = 0.0
    with operator:
        eventually("ready", lambda: operator.operator.ready)
        eventually("a launch hangs", lambda: hung)
        run.create()
        key = (run.namespace, run.name)
        eventually("the new run is seen", lambda: key in operator.operator.cache.run_keys(), 15)


def test_an_operator_that_may_nothing_says_what_to_do_and_ends(cp: devcluster.ControlPlane) -> None:
    kubeconfig = cp.write_kubeconfig("nobody", "nobody")
    command = [sys.executable, "-m", "lora_operator", f"--kubeconfig={kubeconfig}", "--http-port=0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert 'User "nobody" cannot list resource' in ended.stderr
    assert "helm upgrade" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_api_server_goes_away_and_comes_back(
    run: Run, settings: Settings, cp: devcluster.ControlPlane, api: Api
) -> None:
    """Its watch cache is new and knows no old versions: the operator's watches end with 410 and begin anew."""
    with OperatorThread(settings):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        for _ in range(2):
            for number in range(3):  # versions that no watch of the operator has seen
                path = f"/api/v1/namespaces/{run.namespace}/configmaps"
                name = f"noise-{number}"
                api.create(path, {"metadata": {"name": name}})
                api.delete(f"{path}/{name}")
            cp.kill_api_server()
            cp.start_api_server()
        run.set_failed(1, "StoreUnavailable", 74)
        run.set_running(2)
        run.wait("attempt 2", lambda status: status.get("attempt") == 2, 60)
        run.set_succeeded(2)
        run.wait_phase("Succeeded", 60)
    assert jobs_created(cp, run.namespace) == ["run-1", "run-2"]


def test_etcd_stands_still_for_a_while(run: Run, settings: Settings, cp: devcluster.ControlPlane) -> None:
    with OperatorThread(settings):
        run.create()
        run.set_running(1)
        etcd = cp.pids()["etcd"]
        os.kill(etcd, signal.SIGSTOP)
        try:
            with pytest.raises(devcluster.DevclusterError):
                cp.kubectl("get", "pods", "--request-timeout=3s")
        finally:
            os.kill(etcd, signal.SIGCONT)
        run.wait_phase("Running", 60)
        run.set_succeeded(1)
        run.wait_phase("Succeeded", 60)
    assert jobs_created(cp, run.namespace) == ["run-1"]


@pytest.mark.parametrize("hours", [-2.0, 0.5])
def test_the_clock_jumps(run: Run, settings: Settings, hours: float) -> None:
    jump = timedelta()

    def clock() -> datetime:
        return utc_now() + jump

    with OperatorThread(settings, clock=clock):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        jump = timedelta(hours=hours)
        run.set_failed(1, "StoreUnavailable", 74)
        run.set_running(2)
        run.wait("attempt 2", lambda status: status.get("attempt") == 2)
        jump = timedelta()
        run.set_succeeded(2)
        status = run.wait_phase("Succeeded")
    assert [failure["class"] for failure in status["failures"]] == ["StoreUnavailable"]


def test_a_status_that_somebody_edits_is_put_right(
    run: Run, operator: OperatorThread, cp: devcluster.ControlPlane
) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    nonsense = {"phase": "Succeeded", "reason": "Because", "attempt": 0, "conditions": [], "progress": None}
    run.api.patch(f"{run.path}/{run.name}/status", {"status": nonsense})
    status = run.wait_phase("Running")
    assert (status["attempt"], run.condition("Running")["status"]) == (1, "True")
    run.set_succeeded(1)
    run.wait_phase("Succeeded")
    assert jobs_created(cp, run.namespace) == ["run-1"]


def test_a_job_that_somebody_shrinks_is_replaced(run: Run, operator: OperatorThread) -> None:
    """The Job controller ends the pods that are too many; a gang cannot go on without them."""
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    path = f"/apis/batch/v1/namespaces/{run.namespace}/jobs/run-1"
    run.api.patch(path, {"spec": {"parallelism": 1, "completions": 1}})
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2, 60)
    assert status["failures"][0]["class"] == "PodLost"
    assert len(run.gang(2)) == 2


def test_the_next_attempt_has_the_service_again_that_somebody_deleted(run: Run, operator: OperatorThread) -> None:
    """Nobody watches it. A gang that has met needs it no more, and one that cannot meet says so and fails."""
    services = f"/api/v1/namespaces/{run.namespace}/services"
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.api.delete(f"{services}/run-gang")
    run.set_failed(1, "PeerLost", 73, "run-1-0.run-gang.team.svc, the pod of rank 0, has no address")
    run.gang(2)
    (again,) = run.services()
    run.set_running(2)
    run.set_failed(2, "StoreUnavailable", 74)
    run.gang(3)
    assert [item["metadata"]["uid"] for item in run.services()] == [again["metadata"]["uid"]], "it is not made anew"


def test_a_namespace_goes_with_all_that_is_in_it(
    api: Api, make_namespace: Callable[[], str], fast_settings: Callable[..., Settings]
) -> None:
    going, staying = make_namespace(), make_namespace()
    with OperatorThread(fast_settings("", namespaces=(going, staying))) as operator:
        leaving, other = Run(api, going).create(), Run(api, staying).create()
        leaving.set_running(1)
        leaving.wait_phase("Running")
        api.delete(f"/api/v1/namespaces/{going}")
        leaving.set_failed(1, "StoreUnavailable", 74)
        eventually("the run is gone", lambda: api.items(leaving.path) == [], 60)
        other.set_running(1)
        other.set_succeeded(1)
        other.wait_phase("Succeeded")
        refused = [call for call in operator.calls if f"/{going}/" in call and call.startswith(("PATCH", "POST"))]
        assert len(refused) < 30, "calls into a namespace that is going are tried again and again"


def test_the_crd_is_upgraded_under_a_run(
    run: Run, fast_settings: Callable[..., Settings], cp: devcluster.ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version knows a field more, and then a value. What runs goes on, and is followed once it is understood.

    No watch tells of a changed CRD until the run is written to, and one that began before not even then: what is said
    of the run may change with who told of it last.
    """

    def is_said(reason: str, words: str) -> bool:
        run.api.patch(f"{run.path}/{run.name}", {"metadata": {"annotations": {"written": str(time.monotonic())}}})
        return any(event["reason"] == reason and words in event["note"] for event in run.events())

    def set_policy(value: str) -> None:
        run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"onOutOfMemory": value}}})

    monkeypatch.setattr("lora_operator.controller.finetunes.INVALID_RETRY", 0.5)
    text = (CRDS / "lorafinetunes.lorafinetune.io.yaml").read_text()
    later = yaml.safe_load(text)
    whole = later["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    del whole["x-kubernetes-validations"]  # so that the test can change the specification
    schema = whole["properties"]["spec"]["properties"]
    schema["later"] = {"type": "string", "default": "yes"}
    schema["runPolicy"]["properties"]["onOutOfMemory"]["enum"].append("offload")
    with OperatorThread(fast_settings(run.namespace, failure_grace=60.0, node_grace=60.0)):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        try:
            apply_crd(cp, json.dumps(later))
            eventually("the default shows", lambda: run.raw["spec"].get("later") == "yes")
            eventually("the new field is said", lambda: is_said("FieldsLeftOut", "spec.later"))
            eventually("the new value is taken", lambda: set_policy("offload") is None)
            eventually("the new value is said", lambda: is_said("NotUnderstood", "spec.runPolicy.onOutOfMemory"))
            before = run.status
            run.set_ended(1, 1, 74, termination("StoreUnavailable", "503 Slow Down", rank=1))
            eventually("it is looked at again", lambda: is_said("NotUnderstood", "spec.runPolicy.onOutOfMemory"))
            assert (before["phase"], before["reason"]) == ("Running", "Running")
            assert (run.status, len(run.pods(1))) == (before, 2), "what runs is left alone"
            set_policy("fail")
        finally:
            apply_crd(cp, text)
        run.set_ended(1, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))
        run.set_running(2)
        run.wait("attempt 2", lambda status: status.get("attempt") == 2, 60)
        run.set_succeeded(2)
        run.wait_phase("Succeeded", 60)
    assert run.condition("Stalled")["status"] == "False"
    assert jobs_created(cp, run.namespace) == ["run-1", "run-2"]


def apply_crd(cp: devcluster.ControlPlane, text: str) -> None:
    cp.kubectl("apply", "--filename=-", "--server-side", "--force-conflicts", input=text)

"""The operator is cut, killed, doubled or left alone, and nothing is lost, done twice, or asked for without need."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import devcluster
from devcluster.ports import PortLease
from lora_operator.kube.client import KubeClient
from lora_operator.kube.rights import RBAC
from lora_operator.settings import Settings
from lora_operator.watched.cache import Resource
from tests.support.api import Api
from tests.support.operators import OperatorThread
from tests.support.runs import Run, termination
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

ROOT = Path(__file__).parents[3]
QUIET_SECONDS = 2.0


def live(run: Run, is_over: Callable[[], bool] = lambda: False) -> None:
    """Plays the nodes for a whole life: attempt 1 fails, attempt 2 succeeds. Stops early when ``is_over``."""
    steps: list[Callable[[], object]] = [
        lambda: _running(run, 1),
        lambda: run.set_failed(1, "Internal", 70, "503 Slow Down"),
        lambda: _running(run, 2),
        lambda: run.set_succeeded(2),
    ]
    attempts = [1, 1, 2, 2]
    for attempt, step in zip(attempts, steps, strict=True):
        eventually(f"pods of attempt {attempt}", lambda attempt=attempt: is_over() or len(run.pods(attempt)) == 2, 60)
        if is_over():
            return
        step()


def _running(run: Run, attempt: int) -> None:
    run.set_running(attempt)


def replay(run: Run) -> None:
    """Goes on with ``live`` from wherever the pods are."""
    if run.status.get("phase") == "Succeeded":
        return
    second = run.pods(2)
    if not second:
        first = eventually("a gang", lambda: (len(run.pods(1)) == 2 and run.pods(1)) or run.pods(2), 60)
        if not run.pods(2) and all(pod["status"]["phase"] in ("Pending", "Running") for pod in first):
            run.set_running(1)
            run.set_failed(1, "Internal", 70, "503 Slow Down")
        eventually("attempt 2", lambda: len(run.pods(2)) == 2, 60)
    if any(pod["status"]["phase"] != "Succeeded" for pod in run.pods(2)):
        run.set_running(2)
        run.set_succeeded(2)


def check_end(run: Run) -> None:
    """The one end state, however it was reached."""
    status = run.wait_phase("Succeeded", 60)
    assert (status["attempt"], status["chargedRestarts"]) == (2, 1)
    assert [failure["class"] for failure in status["failures"]] == ["Internal"]
    assert [job["metadata"]["name"] for job in run.jobs()] == ["run-2"]
    assert [item["metadata"]["name"] for item in run.services()] == ["run-gang"], "one for both attempts"
    uid = run.raw["metadata"]["uid"]
    assert {job["metadata"]["ownerReferences"][0]["uid"] for job in run.jobs()} == {uid}
    reasons = [event["reason"] for event in run.events()]
    assert len(reasons) == len(set(reasons)) + (1 if reasons.count("Started") == 2 else 0) + (
        1 if reasons.count("Running") == 2 else 0
    ), reasons


def jobs_created(cp: devcluster.ControlPlane, namespace: str) -> list[str]:
    """Names of the Jobs that were ever created in ``namespace``, as the audit log has them."""
    names = []
    for entry in cp.audit_entries("lora-operator"):
        reference = entry.get("objectRef", {})
        is_job = (reference.get("resource"), reference.get("namespace")) == ("jobs", namespace)
        if is_job and entry["verb"] == "create" and entry.get("responseStatus", {}).get("code") == 201:
            names.append(reference["name"])
    return sorted(names)


@pytest.mark.parametrize("is_taken", [False, True])
def test_no_pod_is_called_silent_before_a_last_look(
    run: Run, fast_settings: Callable[..., Settings], namespace: str, is_taken: bool
) -> None:
    """Its node is lost, and so are the watches that would tell."""
    blind, unseen = threading.Event(), list[Any]()
    thread = OperatorThread(fast_settings(namespace, node_grace=4.0))
    see = thread.operator._on_event

    def look(*event: Any) -> None:
        unseen.append(event) if blind.is_set() else see(*event)

    thread.operator._on_event = look  # type: ignore[method-assign]
    with thread:
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        run.set_ended(1, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))
        run.wait("a word is awaited", lambda status: status["reason"] == "PodFailed")
        blind.set()
        pod = run.gang(1)[1]
        lost = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "no word"}
        run.set_pod(pod, {"phase": "Failed", "conditions": [lost]})
        if is_taken:
            run.api.delete(f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}", gracePeriodSeconds=0)
            eventually("it is gone", lambda: len(run.pods(1)) == 1)
        status = run.wait("a verdict", lambda status: status.get("failures"))
        eventually("watches had news", lambda: unseen)
    assert (status["failures"][0]["class"], status["chargedRestarts"]) == ("PodLost" if is_taken else "NodeLost", 0)


def test_a_pod_that_is_drained_has_its_time_for_a_checkpoint_and_nobody_is_blamed(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    """Its peers end first, and say only that they lost it; then so long passes as a silent pod would have."""
    with OperatorThread(fast_settings(namespace, node_grace=1.0)):
        run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
        drained, _ = run.gang(1)
        path = f"/api/v1/namespaces/{namespace}/pods/{drained['metadata']['name']}"
        target = {"apiVersion": "v1", "kind": "Node", "name": f"{namespace}-drained"}
        run.api.create(f"{path}/binding", {"metadata": {"name": drained["metadata"]["name"]}, "target": target})
        run.set_running(1)
        run.wait_phase("Running")
        run.api.delete(path)
        eventually("it is asked to stop", lambda: "deletionTimestamp" in run.gang(1)[0]["metadata"])
        run.set_ended(1, 1, 73, termination("PeerLost", "Connection closed by peer", rank=1))
        run.wait("it is waited for", lambda status: "asked to stop" in run.condition("Running")["message"])
        begin = time.monotonic()
        eventually("the time of a silent pod", lambda: time.monotonic() - begin > 2.0)
        assert not run.status.get("failures")
        run.set_ended(1, 0, 75, termination("Checkpointed", "Saved a checkpoint", rank=0, step=9))
        status = run.wait("the next attempt", lambda status: status.get("failures"))
    assert (status["failures"][0]["class"], status["failures"][0]["pod"]) == (
        "Checkpointed",
        drained["metadata"]["name"],
    )
    assert (status["chargedRestarts"], status["phase"]) == (0, "Restarting")


def test_an_operator_cut_after_any_call_is_continued_by_the_next(
    cp: devcluster.ControlPlane,
    api: Api,
    make_namespace: Callable[[], str],
    fast_settings: Callable[..., Settings],
) -> None:
    """THE property: for every k, cut after the k-th call; a fresh operator reaches the same end."""

    def live_with_cut(k: int | None) -> int:
        namespace = make_namespace()
        run = Run(api, namespace).create()
        settings = fast_settings(namespace, log_interval=60.0, progress_interval=60.0)
        first = OperatorThread(settings, cut_after=k).start()
        try:
            live(run, is_over=lambda: first.is_cut)
            eventually("the cut or the end", lambda: first.is_cut or run.status.get("phase") == "Succeeded", 60)
            if k is None:
                eventually("the last Event", lambda: any(event["reason"] == "Succeeded" for event in run.events()))
        finally:
            first.stop()
        if k is not None:
            with OperatorThread(settings):
                replay(run)
                check_end(run)
        else:
            check_end(run)
        assert jobs_created(cp, namespace) == ["run-1", "run-2"], f"k={k}"
        return len(first.calls)

    calls = live_with_cut(None)
    assert 20 <= calls <= 40, calls
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(live_with_cut, range(1, calls + 1)))


def test_pods_that_came_and_failed_while_an_operator_started_are_asked_for_their_last_words(
    run: Run, settings: Settings
) -> None:
    """Its list of pods is older than its list of Jobs: failed indexes alone are no pods that are gone."""
    with OperatorThread(settings):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
    run.set_failed(1, "BadData", 65, "record 7 is broken")
    eventually("the Job knows", lambda: run.jobs()[0]["status"].get("failedIndexes") == "0,1")

    hidden = list[str]()

    def list_no_pods_at_first(client: KubeClient) -> None:
        whole = client.fetch_list

        async def fetch_list(resource: str, *args: Any) -> AsyncIterator[dict[str, Any]]:
            async for item in whole(resource, *args):
                if resource == "pods" and len(args) == 1:
                    hidden.append(item["metadata"]["name"])
                else:
                    yield item

        client.fetch_list = fetch_list  # type: ignore[method-assign]

    with OperatorThread(settings, wrap=list_no_pods_at_first):
        status = run.wait_phase("Failed")
    assert len(hidden) == 2, "its list had no pods"
    assert [(failure["class"], failure["message"]) for failure in status["failures"]] == [
        ("BadData", "record 7 is broken")
    ]
    assert status["attempt"] == 1


def test_a_gang_that_succeeded_and_went_away_unseen_is_made_again(run: Run, settings: Settings) -> None:
    """It goes on from its last checkpoint, and publishes the same adapter."""
    with OperatorThread(settings):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
    run.set_succeeded(1)
    eventually("the Job is complete", lambda: run.jobs()[0]["status"].get("completionTime"))
    for pod in run.pods(1):
        run.api.delete(f"/api/v1/namespaces/{run.namespace}/pods/{pod['metadata']['name']}")
    with OperatorThread(settings):
        run.set_running(2)
        run.set_succeeded(2)
        status = run.wait_phase("Succeeded")
    [failure] = status["failures"]
    assert (failure["class"], failure["reason"], status.get("chargedRestarts", 0)) == ("PodLost", "PodGone", 0)


def test_a_pod_that_went_unseen_holds_nothing_up(run: Run, fast_settings: Callable[..., Settings]) -> None:
    """No watch has told of its end, as after a list that shows no pod at all, and its Job is gone."""
    with OperatorThread(fast_settings(run.namespace, confirm_after=600.0)) as operator:
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        pod = run.api.get(f"/api/v1/namespaces/{run.namespace}/pods/{run.gang(1)[0]['metadata']['name']}")
        names = {"name": "run-1-0-unseen", "uid": "unseen", "creationTimestamp": "2026-01-01T00:00:00Z"}
        unseen = {**pod, "metadata": {**pod["metadata"], **names}}
        operator.loop.call_soon_threadsafe(operator.operator.cache.put, Resource.PODS, unseen)
        run.set_failed(1, "Internal", 70)
        run.set_running(2)
        run.set_succeeded(2)
        run.wait_phase("Succeeded")
    pods = f"GET /api/v1/namespaces/{run.namespace}/pods"
    assert operator.calls.count(pods) == 2, "one of them at the start"


def test_two_operators_at_once_make_one_run(run: Run, settings: Settings, cp: devcluster.ControlPlane) -> None:
    with OperatorThread(settings), OperatorThread(settings):
        run.create()
        live(run)
        check_end(run)
    assert jobs_created(cp, run.namespace) == ["run-1", "run-2"]


def test_events_are_not_posted_twice_by_a_restarted_operator(run: Run, settings: Settings) -> None:
    run.create()
    for step in (lambda: run.gang(1), lambda: run.set_running(1), lambda: run.wait_phase("Running"), lambda: None):
        with OperatorThread(settings) as operator:
            eventually("ready", lambda operator=operator: operator.operator.ready)
            step()
    reasons = ["Started", "Running"]
    eventually("the Events", lambda: [event["reason"] for event in run.events()] == reasons)


def test_nothing_is_asked_for_while_nothing_changes(run: Run, settings: Settings, cp: devcluster.ControlPlane) -> None:
    def requests() -> list[str]:
        entries = [entry for entry in cp.audit_entries("") if entry.get("verb") != "watch"]
        return [entry["requestURI"] for entry in entries if run.namespace in entry["requestURI"] and _ours(entry)]

    def stays_quiet(operator: OperatorThread) -> None:
        """Two equal counts QUIET_SECONDS apart."""
        begin = time.monotonic()
        counts = [(len(operator.calls), len(requests()))]

        def quiet() -> bool:
            count = len(operator.calls), len(requests())
            if count != counts[-1]:
                counts.append(count)
            return time.monotonic() - begin > QUIET_SECONDS

        eventually("quiet time", quiet)
        assert len(counts) == 1, operator.calls[counts[0][0] :]

    with OperatorThread(settings) as operator:
        run.create()
        run.gang(1)
        run.wait_phase("Starting")
        eventually("the first Event", run.events)
        eventually("confirmed", lambda: not operator.operator._confirmations.pending, 10)
        stays_quiet(operator)
        run.set_running(1)
        run.set_succeeded(1)
        run.wait_phase("Succeeded")
        eventually("the last Event", lambda: len(run.events()) >= 2)
        eventually("the end of the Job", lambda: not run.jobs()[0]["status"].get("active"))
        stays_quiet(operator)
    with OperatorThread(settings) as restarted:
        eventually("ready", lambda: restarted.operator.ready)
        eventually("confirmed", lambda: not restarted.operator._confirmations.pending, 10)
        assert [call.split()[0] for call in restarted.calls] == ["GET"] * len(Resource), "a restart writes nothing"


def _ours(entry: dict[str, Any]) -> bool:
    agent = entry.get("userAgent", "")
    return agent.startswith("lora-operator") or "kopf" in agent


def test_an_operator_with_just_its_role_can_do_all_it_has_to(
    cp: devcluster.ControlPlane, api: Api, run: Run, settings: Settings
) -> None:
    kubeconfig = cp.write_kubeconfig("narrow", "narrow")
    group, subject = "rbac.authorization.k8s.io", {"kind": "User", "name": "narrow"}
    for cluster, kind, where in ((False, "Role", f"namespaces/{run.namespace}/"), (True, "ClusterRole", "")):
        rules = [
            {"apiGroups": [rule.group], "resources": [*rule.resources], "verbs": [*rule.verbs]}
            | ({"resourceNames": [*rule.names]} if rule.names else {})
            for rule in RBAC
            if rule.cluster is cluster
        ]
        path, role = f"/apis/{group}/v1/{where}{kind.lower()}", {"kind": kind, "name": "operator", "apiGroup": group}
        api.create(f"{path}s", {"metadata": {"name": "operator"}, "rules": rules})
        binding = {"metadata": {"name": "operator"}, "roleRef": role, "subjects": [{**subject, "apiGroup": group}]}
        api.create(f"{path}bindings", binding)
    values = {**settings.__dict__, "kubeconfig": str(kubeconfig), "default_runtime": '{"image": "trainer:narrow"}'}
    try:
        with OperatorThread(Settings(**values)):
            run.create()
            live(run)
            check_end(run)
            eventually("Events", lambda: any(event["reason"] == "Succeeded" for event in run.events()))
        assert run.status["runtime"]["spec"]["image"] == "trainer:narrow"
    finally:
        api.delete("/apis/lorafinetune.io/v1alpha1/clusterloraruntimes/default")


@contextmanager
def process(settings: Settings, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The real process, as its container runs it."""
    arguments = [
        f"--kubeconfig={settings.kubeconfig}",
        f"--namespaces={','.join(settings.namespaces)}",
        f"--http-port={port}",
        "--http-host=127.0.0.1",
        "--metrics-auth=none",
        "--failure-grace=1",
        "--preflight=off",
        "--log-format=json",
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", "lora_operator", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'operator'}"},
        stderr=subprocess.PIPE,
    )
    try:
        eventually("readiness", lambda: _get(port, "/readyz") == "ok\n")
        yield child
    finally:
        child.kill()
        _, log = child.communicate()
        sys.stdout.write(log.decode())


def _get(port: int, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return ""


def test_the_process_is_killed_and_started_again_in_the_middle_of_a_run(run: Run, settings: Settings) -> None:
    lease = PortLease()
    with process(settings, lease.port):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        assert _get(lease.port, "/healthz") == "ok\n"
    job = run.jobs()[0]["metadata"]["uid"]
    run.set_failed(1, "Internal", 70)  # while nobody looks
    with process(settings, lease.port) as child:
        run.wait("attempt 2", lambda status: status.get("attempt") == 2)
        run.set_running(2)
        run.set_succeeded(2)
        check_end(run)
        metrics = _get(lease.port, "/metrics")
        assert 'lora_operator_runs{phase="Succeeded"} 1.0' in metrics
        wanted = f'lora_operator_failures_total{{failure_class="Internal",namespace="{run.namespace}"}} 1.0'
        assert wanted in metrics
        assert 'lora_operator_api_calls_total{code="201",resource="jobs",verb="create"} 1.0' in metrics
        assert "lora_operator_queue_depth 0.0" in metrics
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=20) == 0
    lease.release()
    assert run.jobs()[0]["metadata"]["uid"] != job

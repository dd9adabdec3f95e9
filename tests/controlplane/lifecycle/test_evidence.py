"""Logs and Events that are slow to come, or that the operator may not read."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import devcluster
from lora_operator.settings import Settings
from tests.support.api import Api
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, running, termination, waiting
from tests.support.wait import eventually

RBAC = "/apis/rbac.authorization.k8s.io/v1"
HUNG = 24


@pytest.fixture
def hung_kubelet() -> Iterator[int]:
    """The port of one that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in connections:
            connection.close()


def add_node(api: Api, name: str, port: int) -> None:
    api.create("/api/v1/nodes", {"metadata": {"name": name}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
    }
    api.patch(f"/api/v1/nodes/{name}/status", {"status": status})


def bind(run: Run, pod: dict[str, Any], node: str) -> None:
    name = pod["metadata"]["name"]
    target = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": name},
        "target": {"kind": "Node", "name": node},
    }
    run.api.create(f"/api/v1/namespaces/{run.namespace}/pods/{name}/binding", target)


def test_kubelets_that_hang_hold_up_no_launch(
    api: Api, namespace: str, fast_settings: Callable[..., Settings], hung_kubelet: int
) -> None:
    settings = fast_settings(namespace, log_interval=0.2, concurrency=8)
    runs = [Run(api, namespace, f"run-{number}") for number in range(HUNG)]
    nodes = [f"hung-{namespace}-{number}" for number in range(HUNG)]
    try:
        with OperatorThread(settings) as operator:
            for run, node in zip(runs, nodes, strict=True):
                add_node(api, node, hung_kubelet)
                run.create(lambda spec: spec.update(parallelism={"nodes": 1, "gpusPerNode": 0}))
            for run, node in zip(runs, nodes, strict=True):
                (pod,) = run.gang(1, 1)
                bind(run, pod, node)
                run.set_pod(pod, running())
            eventually("logs are asked for", lambda: sum("/log" in call for call in operator.calls) >= HUNG // 3)
            new = Run(api, namespace, "new")
            begin = time.monotonic()
            new.create()
            eventually("a launch", new.jobs)
            took = time.monotonic() - begin
            assert took < 5, f"a launch took {took:.1f} s beside {HUNG} kubelets that hang"
            # One whose pod fails on such a node gets its verdict without the words that nobody can read.
            (pod,) = runs[0].gang(1, 1)
            runs[0].set_pod(pod, ended(65, termination("BadData", "record 7 has no answer", rank=0)))
            (failure,) = runs[0].wait_phase("Failed")["failures"]
            assert failure["message"] == "record 7 has no answer"
            assert "logTail" not in failure
    finally:
        for node in nodes:
            with contextlib.suppress(Exception):
                api.delete(f"/api/v1/nodes/{node}")


def restrict(api: Api, cp: devcluster.ControlPlane, namespace: str, resource: str, verb: str) -> str:
    """A kubeconfig of somebody who may do all in ``namespace`` that the operator does, but for one verb."""
    name = f"without-{resource.replace('/', '-')}-{verb}-{namespace}"
    everything = {
        ("lorafinetune.io", "lorafinetunes"): "get list watch patch delete",
        ("lorafinetune.io", "lorafinetunes/status"): "get patch",
        ("lorafinetune.io", "clusterloraruntimes"): "get list watch",
        ("batch", "jobs"): "get list watch create patch delete",
        ("", "pods"): "get list watch",
        ("", "pods/log"): "get",
        ("", "configmaps"): "get create delete",
        ("", "services"): "get create delete",
        ("", "namespaces"): "get",
        ("networking.k8s.io", "networkpolicies"): "get create delete",
        ("events.k8s.io", "events"): "list create",
    }
    rules = [
        {
            "apiGroups": [group],
            "resources": [kind],
            "verbs": [one for one in verbs.split() if (kind, one) != (resource, verb)],
        }
        for (group, kind), verbs in everything.items()
    ]
    rules = [rule for rule in rules if rule["verbs"]]
    api.create(f"{RBAC}/clusterroles", {"metadata": {"name": name}, "rules": rules})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": name}
    api.create(f"{RBAC}/clusterrolebindings", {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]})
    return str(cp.write_kubeconfig(name, name))


@pytest.fixture
def without(
    api: Api, cp: devcluster.ControlPlane, namespace: str, fast_settings: Callable[..., Settings]
) -> Callable[[str, str], Settings]:
    def make(resource: str, verb: str) -> Settings:
        return fast_settings(namespace, kubeconfig=restrict(api, cp, namespace, resource, verb))

    return make


def tells(run: Run, words: str) -> None:
    def look() -> bool:
        found = [f"{item['reason']}: {item.get('message', '')}" for item in run.status.get("conditions", [])]
        assert any(words in text for text in found), json.dumps(found, indent=1)
        return True

    eventually(f"the status tells of {words!r}", look)


def test_a_job_that_may_not_be_deleted_is_told_of(run: Run, without: Callable[[str, str], Settings]) -> None:
    with OperatorThread(without("jobs", "delete")):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        run.set_failed(1, "StoreUnavailable", 74)
        tells(run, "The operator may not delete jobs")
        assert run.status["phase"] == "Restarting"
        run.set_running(2)  # no pod of the first attempt holds anything
        run.wait_phase("Running")


def test_pods_that_may_not_be_ended_after_the_end_are_told_of(
    run: Run, without: Callable[[str, str], Settings]
) -> None:
    with OperatorThread(without("jobs", "patch")):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        run.set_ended(1, 1, 65, termination("BadData", "record 7", rank=1))
        run.wait_phase("Failed")
        tells(run, "OperatorForbidden: The operator may not patch jobs")
        assert run.condition("Failed")["reason"] == "BadData", "the end of the run stays what it is"


def test_events_that_may_not_be_read_stop_nothing_else(
    run: Run, api: Api, without: Callable[[str, str], Settings]
) -> None:
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "0"}}}
    api.create(f"/api/v1/namespaces/{run.namespace}/resourcequotas", quota)
    path = f"/api/v1/namespaces/{run.namespace}/resourcequotas/few"
    eventually("the quota counts", lambda: api.get(path).get("status", {}).get("hard"))
    with OperatorThread(without("events", "list")):
        run.create()
        run.wait_phase("Starting")
        tells(run, "The operator may not list events")
        run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": True}}})
        run.wait_phase("Suspended")


def test_a_queue_that_may_not_be_asked_is_told_of_and_the_run_goes_on(
    run: Run, api: Api, without: Callable[[str, str], Settings]
) -> None:
    """The role here is one that was written before there were queues."""
    with OperatorThread(without("configmaps", "get")):
        run.create(lambda spec: spec.update(runPolicy={"queueName": "team-a"}))
        run.wait_phase("Queued")
        tells(run, "The operator may not list workloads.kueue.x-k8s.io")
        api.patch(f"/apis/batch/v1/namespaces/{run.namespace}/jobs/run-1", {"spec": {"suspend": False}})
        run.set_running(1)
        run.wait_phase("Running")


@pytest.mark.parametrize(("resource", "verb"), [("pods/log", "get"), ("events", "create")])
def test_a_run_ends_without_what_is_for_people_alone(
    run: Run, without: Callable[[str, str], Settings], resource: str, verb: str
) -> None:
    with OperatorThread(without(resource, verb)):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        run.set_succeeded(1)
        run.wait_phase("Succeeded")


def warn(run: Run, pod: dict[str, Any], reason: str, note: str) -> None:
    """What a kubelet does about a pod that does not start."""
    regarding = {"apiVersion": "v1", "kind": "Pod", "name": pod["name"], "namespace": run.namespace, "uid": pod["uid"]}
    event = {
        "metadata": {"name": f"{pod['name']}.{reason.lower()}"},
        "type": "Warning", "reason": reason, "note": note,
        "regarding": regarding, "eventTime": "2026-01-01T00:00:00.000000Z", "action": "Mount",
        "reportingController": "kubelet", "reportingInstance": "node-1",
    }  # fmt: skip
    run.api.create(f"/apis/events.k8s.io/v1/namespaces/{run.namespace}/events", event)


def test_why_a_pod_does_not_start_is_said_in_the_words_of_its_events(
    run: Run, fast_settings: Callable[..., Settings]
) -> None:
    with OperatorThread(fast_settings(run.namespace, start_timeout=600.0)):
        run.create()
        pods = run.gang(1)
        for pod in pods:
            run.set_pod(pod, waiting("ContainerCreating", ""))
        pod = pods[1]["metadata"]
        warn(run, pod, "FailedMount", 'MountVolume.SetUp failed: configmap "data" not found')
        status = run.wait("it is said", lambda status: status.get("reason") == "FailedMount")
        assert status["phase"] == "Starting"
        message = run.condition("Running")["message"]
        assert f"Pod {pod['name']} does not start: FailedMount: MountVolume.SetUp failed" in message
        assert "Nothing to do" not in message
        run.set_running(1)
        run.wait_phase("Running")
        assert run.condition("Running")["reason"] == "PodsRunning"


def test_a_pod_that_never_starts_gives_its_node_back_and_another_one_is_to_be_tried(
    run: Run, operator: OperatorThread
) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    first, second = run.gang(1)
    run.set_pod(first, running())
    bind(run, second, "n1")
    run.set_pod(second, waiting("ContainerCreating", ""))
    warn(run, second["metadata"], "FailedScheduling", "0/3 nodes are available")
    warn(run, second["metadata"], "FailedCreatePodSandBox", 'plugin type="calico" failed')
    run.wait("it is said", lambda status: status.get("reason") == "FailedCreatePodSandBox")
    status = run.wait("the attempt ends", lambda status: status.get("failures"))
    assert status["phase"] == "Restarting"
    failure = status["failures"][-1]
    assert (failure["class"], failure["reason"], failure["node"]) == ("PodLost", "FailedCreatePodSandBox", "n1")
    assert [node["name"] for node in status["avoidedNodes"]] == ["n1"]
    assert not status.get("chargedRestarts")


def test_what_one_node_does_not_start_beside_others_that_do_is_tried_on_another_one(
    run: Run, operator: OperatorThread
) -> None:
    words = "failed to inject CDI devices: unresolvable CDI devices nvidia.com/gpu=0"
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    first, second = run.gang(1)
    run.set_pod(first, running())
    bind(run, second, "n1")
    run.set_pod(second, waiting("CreateContainerError", words))
    run.wait("it is said", lambda status: status.get("reason") == "PodNotStarted")
    assert f"on node n1: CreateContainerError: {words}. Remedy: " in run.condition("Running")["message"]
    status = run.wait("the attempt ends", lambda status: status.get("failures"))
    assert status["phase"] == "Restarting"
    failure = status["failures"][-1]
    assert (failure["class"], failure["reason"], failure["node"]) == ("PodLost", "PodNotStarted", "n1")
    assert [node["name"] for node in status["avoidedNodes"]] == ["n1"]
    assert not status.get("chargedRestarts")


def test_an_init_container_that_goes_on_is_told_of_and_ends(run: Run, fast_settings: Callable[..., Settings]) -> None:
    with OperatorThread(fast_settings(run.namespace, start_timeout=600.0, preflight_timeout=8.0)):
        run.create()
        status = waiting("PodInitializing", "")
        status["initContainerStatuses"] = [
            {"name": "fetch", "image": "x", "imageID": "", "ready": False, "restartCount": 0,
             "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
        ]  # fmt: skip
        for pod in run.gang(1):
            run.set_pod(pod, status)
        run.wait("it is said", lambda status: status.get("reason") == "InitContainerRuns")
        assert "its init container fetch runs" in run.condition("Running")["message"]
        failure = run.wait("the next attempt", lambda status: status.get("attempt") == 2)["failures"][-1]
        assert (failure["class"], failure["reason"]) == ("PodLost", "InitContainerRuns")

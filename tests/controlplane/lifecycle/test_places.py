"""Nodes that break gangs are avoided, and gangs that are placed in part give back what they hold."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.settings import Settings
from tests.support.api import Api, ApiError
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, now, running, termination, unschedulable
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

REJECTED = {
    "phase": "Failed",
    "reason": "UnexpectedAdmissionError",
    "message": "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy devices",
}
LONG_AGO = "2026-01-01T00:00:00Z"
FULL = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."


def bind(api: Api, pod: dict[str, Any], node: str) -> None:
    """What the scheduler does. A node of that name is made: from one that is missed Kubernetes takes away the pods."""
    try:
        api.create("/api/v1/nodes", {"metadata": {"name": node}})
    except ApiError as error:
        assert error.status == 409, error  # noqa: PT017  (it is there)
    metadata = pod["metadata"]
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/binding"
    api.create(path, {"metadata": {"name": metadata["name"]}, "target": {"kind": "Node", "name": node}})


def avoided_by(run: Run, attempt: int) -> list[str]:
    """The nodes that the pods of ``attempt`` keep away from."""
    [job] = eventually(
        f"the Job of attempt {attempt}",
        lambda: [job for job in run.jobs() if job["metadata"]["name"] == f"run-{attempt}"],
    )
    affinity = job["spec"]["template"]["spec"].get("affinity") or {}
    required = (affinity.get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    return [
        node
        for term in required.get("nodeSelectorTerms", [])
        for one in term["matchFields"]
        if (one["key"], one["operator"]) == ("metadata.name", "NotIn")
        for node in one["values"]
    ]


def test_a_node_that_refuses_pods_is_avoided_until_there_is_no_room_elsewhere(
    run: Run, operator: OperatorThread, api: Api
) -> None:
    run.create(lambda spec: spec.update(runPolicy={"placementTimeoutSeconds": 1}))
    for attempt, bad in ((1, "n1"), (2, "n2")):
        first, second = run.gang(attempt)
        bind(api, first, "n9")
        bind(api, second, bad)
        run.set_pod(second, REJECTED)
        run.set_pod(first, running())
        run.set_ended(attempt, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))
        status = run.wait("the next one", lambda status, attempt=attempt: status.get("attempt") == attempt + 1)
        failure = status["failures"][-1]
        assert (failure["class"], failure["node"]) == ("PodLost", bad)
    assert [(node["name"], node["reason"]) for node in status["avoidedNodes"]] == [("n1", "PodLost"), ("n2", "PodLost")]
    assert avoided_by(run, 3) == ["n1", "n2"]
    for pod in run.gang(3):
        run.set_pod(pod, unschedulable("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."))
    status = run.wait("attempt 4", lambda status: status.get("attempt") == 4)
    assert status["failures"][-1]["class"] == "NotPlaced"
    assert "the nodes that were avoided may be used again: n1, n2" in status["failures"][-1]["message"]
    assert not status.get("avoidedNodes")
    assert avoided_by(run, 4) == []
    assert not status.get("chargedRestarts")


def test_a_preflight_may_go_where_one_was_refused_if_there_is_no_other_node(
    run: Run, fast_settings: Callable[..., Settings], api: Api
) -> None:
    with OperatorThread(fast_settings(run.namespace, preflight="on")):
        run.create()
        [pod] = eventually("a pod", lambda: run.preflight_pods(1))
        bind(api, pod, "n1")
        run.set_preflight(1, REJECTED)
        [pod] = eventually("another pod", lambda: run.preflight_pods(2))
        assert [node["name"] for node in run.status["avoidedNodes"]] == ["n1"]
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        assert "requiredDuringSchedulingIgnoredDuringExecution" not in affinity
        preferred = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        assert {"key": "metadata.name", "operator": "NotIn", "values": ["n1"]} in [
            field for term in preferred for field in term["preference"].get("matchFields", ())
        ]


def test_a_container_that_a_node_cannot_start_is_tried_on_one_other_node(
    run: Run, operator: OperatorThread, api: Api
) -> None:
    words = "OCI runtime create failed: nvidia-container-cli: driver rpc error: timed out"
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    for attempt, bad in ((1, "n1"), (2, "n2")):
        first, second = run.gang(attempt)
        bind(api, first, "n9")
        bind(api, second, bad)
        run.set_pod(first, running())
        run.set_pod(second, ended(128, words, "StartError"))
        run.set_ended(attempt, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))
        if attempt == 1:
            status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
            assert f"did not start on node n1: {words}" in status["failures"][-1]["message"]
            assert avoided_by(run, 2) == ["n1"]
    status = run.wait_phase("Failed")
    assert (status["reason"], status["attempt"]) == ("PodNotStarted", 2)
    assert "node n1 said so too" in run.condition("Stalled")["message"]
    assert [node["name"] for node in status["avoidedNodes"]] == ["n1", "n2"]


def test_a_part_of_a_gang_gives_its_nodes_back_and_tries_again(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"placementTimeoutSeconds": 4, "maxRestarts": 0}))
    for attempt in (1, 2, 3):
        first, second = run.gang(attempt)
        run.set_pod(second, unschedulable(FULL))
        run.set_pod(first, running())
        name = second["metadata"]["name"]
        run.wait("it says who waits", lambda _, name=name: name in run.condition("Scheduled").get("message", ""))
        assert FULL.rstrip(".") in run.condition("Scheduled")["message"]
        status = run.wait("the next one", lambda status, attempt=attempt: status.get("attempt") == attempt + 1)
        failure = status["failures"][-1]
        assert (failure["class"], failure["attempt"]) == ("NotPlaced", attempt)
        assert failure["message"] == f"1 of 2 pods had a node. No node takes pod {name}: {FULL.rstrip('.')}"
    assert (len(status["failures"]), status["recentFailures"]) == (1, 3)
    assert not status.get("chargedRestarts")
    run.set_running(4)
    run.wait_phase("Running")


def test_an_operator_that_comes_later_gives_a_part_its_time_again(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    settings = fast_settings(namespace)
    with OperatorThread(settings):
        run.create(lambda spec: spec.update(runPolicy={"placementTimeoutSeconds": 3}))
        first, second = run.gang(1)
        run.set_pod(first, running())
        run.set_pod(second, unschedulable(FULL))
        run.wait("it waits", lambda _: run.condition("Scheduled").get("reason") == "Unschedulable")
    with OperatorThread(settings):
        run.wait("attempt 2", lambda status: status.get("attempt") == 2)


def test_a_pod_without_room_that_finds_it_in_time_costs_nothing(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"placementTimeoutSeconds": 600}))
    first, second = run.gang(1)
    run.set_pod(first, running())
    run.set_pod(second, unschedulable(FULL))
    run.wait("it waits", lambda _: run.condition("Scheduled").get("reason") == "Unschedulable")
    run.set_pod(second, running())
    status = run.wait_phase("Running")
    assert (status["attempt"], status.get("failures", [])) == (1, [])


def test_a_peer_that_starts_as_the_others_give_up_is_blamed_for_nothing(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, failure_grace=2.0, node_grace=2.0)):
        run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
        late, patient = run.gang(1)
        run.set_pod(late, unschedulable(FULL))
        run.set_pod(patient, running())
        run.wait("it waits", lambda _: run.condition("Scheduled").get("reason") == "Unschedulable")
        run.set_pod(patient, ended(73, termination("PeerLost", "only 1 of 2 nodes came", rank=1)))
        run.wait("the others have a moment", lambda status: status["reason"] == "PodFailed")
        run.set_pod(late, running())
        status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
        failure = status["failures"][0]
        assert (failure["class"], failure["pod"]) == ("PeerLost", patient["metadata"]["name"])
        assert not status.get("chargedRestarts")


def test_a_run_that_was_suspended_for_long_avoids_no_old_nodes(run: Run, settings: Settings) -> None:
    """Its status was written while they were to be avoided, and the first look after that launches."""
    run.create()
    nodes = [{"name": name, "reason": "NodeLost", "since": since} for name, since in (("n1", LONG_AGO), ("n2", now()))]
    run.api.patch(f"{run.path}/{run.name}/status", {"status": {"avoidedNodes": nodes}})
    with OperatorThread(settings):
        assert avoided_by(run, 1) == ["n2"]
        run.wait("it is forgotten", lambda status: [node["name"] for node in status["avoidedNodes"]] == ["n2"])


@pytest.mark.parametrize("preflight", ["off", "on"])
def test_pods_that_no_scheduler_comes_to_are_named(
    run: Run, fast_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, preflight: str
) -> None:
    """There is none here: nobody writes a condition or an Event."""
    for module in ("diagnosis.silence", "evidence.wants"):
        monkeypatch.setattr(f"lora_operator.{module}.QUIET", 0.5)
    kind, pods = ("Scheduled", "pods run-1-0-") if preflight == "off" else ("PreflightPassed", "pod run-pre1-0-")
    with OperatorThread(fast_settings(run.namespace, preflight=preflight)):
        run.create()
        run.wait("a word", lambda _: run.condition(kind).get("reason") == "NoScheduler")
        assert f"No scheduler has come to {pods}" in run.condition(kind)["message"]

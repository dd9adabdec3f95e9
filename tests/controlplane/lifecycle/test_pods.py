"""Pods as they are: with containers of others, lost with their nodes, or owned by nobody."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import devcluster
from lora_operator.clock import utc_now
from lora_operator.settings import Settings
from tests.support.api import Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, running, settled, termination, unschedulable, waiting
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

PROXY = "istio-proxy"
"""The kubelet sorts statuses by name, so this one comes before the trainer's."""


def beside(status: Raw, phase: str = "Running", name: str = PROXY) -> Raw:
    """``status`` of a pod in which a container of a mesh runs too."""
    proxy = {"name": name, "image": "i", "imageID": "", "ready": True, "restartCount": 0}
    proxy["state"] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    return {**status, "phase": phase, "containerStatuses": [proxy, *status.get("containerStatuses", [])]}


def after(state: Raw, name: str, phase: str = "Pending") -> Raw:
    """The status of a pod whose trainer waits for the init container ``name``."""
    first = {"name": name, "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    return {**waiting("PodInitializing", ""), "phase": phase, "initContainerStatuses": [first]}


# Sidecars


def test_a_sidecar_that_runs_on_keeps_no_run_and_no_gpu(run: Run, operator: OperatorThread) -> None:
    run.create()
    for pod in run.gang(1):
        run.set_pod(pod, beside(waiting("PodInitializing", ""), "Pending"))
    assert run.status["phase"] != "Running"
    for pod in run.gang(1):
        run.set_pod(pod, beside(running()))
    run.wait_phase("Running")
    first, second = run.gang(1)
    run.set_pod(second, beside(ended(0, "", "Completed")))
    run.set_pod(first, beside(ended(0, termination(adapter=run.adapter), "Completed")))
    assert run.wait_phase("Succeeded")["attempt"] == 1
    eventually("the Job is gone, and with it the pods", lambda: not run.jobs(), 20)


def test_a_gang_that_failed_is_judged_though_sidecars_run_on(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_running(1)
    first, second = run.gang(1)
    run.set_pod(second, beside(ended(74, termination("StoreUnavailable", "503", rank=1))))
    run.set_pod(first, beside(ended(73, termination("PeerLost", "closed", rank=0))))
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert [failure["class"] for failure in status["failures"]] == ["StoreUnavailable"]
    assert run.pods(1) == []


def test_a_preflight_that_passed_is_ended_with_its_sidecar(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, preflight="on")):
        run.create()
        run.set_preflight(1, beside(ended(0, settled(), "Completed")))
        run.wait("attempt 1", lambda status: status.get("attempt") == 1)
        assert [job["metadata"]["name"] for job in run.jobs()] == ["run-1"]


# Init containers


def test_an_init_container_of_somebody_else_that_fails_is_named(run: Run, operator: OperatorThread) -> None:
    run.create()
    first, second = run.gang(1)
    state = {"terminated": {"exitCode": 67, "reason": "Error", "message": "vault: permission denied"}}
    run.set_pod(first, after(state, "vault-agent-init", "Failed"))
    run.set_pod(second, after({"waiting": {"reason": "PodInitializing"}}, "vault-agent-init"))
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    [failure] = status["failures"]
    assert (failure["class"], failure["reason"]) == ("PodLost", "InitContainerFailed")
    name = first["metadata"]["name"]
    words = f"Init container vault-agent-init of pod {name} ended with exit code 67 (Error): vault: permission denied"
    assert failure["message"].startswith(words)
    assert f"kubectl logs {name} -c vault-agent-init" in failure["remedy"]
    assert status["chargedRestarts"] == 0


def test_the_image_of_an_init_container_is_said_to_be_missing(run: Run, operator: OperatorThread) -> None:
    run.create()
    for pod in run.gang(1):
        state = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
        run.set_pod(pod, after(state, "istio-init"))
    status = run.wait("the reason", lambda status: status.get("reason") == "ImagePullFailed")
    assert status["phase"] == "Starting"
    assert ", init container istio-init: ImagePullBackOff: no such image" in run.condition("Running")["message"]


# Nodes


@pytest.mark.parametrize(("code", "reason"), [(137, "ContainerStatusUnknown"), (255, "Unknown")])
def test_a_node_that_restarts_loses_its_pods(run: Run, operator: OperatorThread, code: int, reason: str) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.set_ended(1, 1, code, "The container could not be located", reason)
    run.set_ended(1, 0, 73, termination("PeerLost", "closed", rank=0))
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert (status["failures"][0]["class"], status["chargedRestarts"]) == ("PodLost", 0)


def test_an_image_counts_from_when_it_could_not_be_pulled(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    """By then the pods may have waited for their nodes for hours; and what was pulled begins anew."""
    ahead = timedelta(0)
    with OperatorThread(fast_settings(namespace, start_timeout=600.0), clock=lambda: utc_now() + ahead):
        run.create()
        for pod in run.gang(1):
            run.set_pod(pod, unschedulable("0/3 nodes are available"))
        run.wait("no node", lambda status: status.get("reason") == "Unschedulable")
        for pod in run.gang(1):
            run.set_pod(pod, waiting("ContainerCreating", ""))
        run.wait("nodes", lambda status: status["reason"] != "Unschedulable")
        for _ in range(3):
            ahead += timedelta(seconds=590)
            run.set_pod(run.gang(1)[0], waiting("ErrImagePull", "429 Too Many Requests"))
            assert run.wait("the reason", lambda status: status["reason"] == "ImagePullFailed")["phase"] == "Starting"
            run.set_pod(run.gang(1)[0], waiting("ContainerCreating", ""))
            run.wait("another reason", lambda status: status["reason"] != "ImagePullFailed")
        run.set_pod(run.gang(1)[0], waiting("ErrImagePull", "not found"))
        run.wait("the reason", lambda status: status["reason"] == "ImagePullFailed")
        ahead += timedelta(seconds=601)
        run.set_pod(run.gang(1)[0], waiting("ImagePullBackOff", "not found"))
        assert run.wait_phase("Failed")["failures"][0]["class"] == "ImagePullFailed"


@pytest.mark.parametrize("hours", [-2, 2])
def test_the_clock_of_a_node_is_never_compared_with_ours(
    run: Run, fast_settings: Callable[..., Settings], namespace: str, hours: int
) -> None:
    """That of a preflight's node is hours off, as are the times in all that its kubelet writes."""
    wrong = (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = running()
    status["containerStatuses"][0]["state"]["running"]["startedAt"] = wrong
    status["conditions"] = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": wrong}]
    ahead = timedelta(0)
    settings = fast_settings(namespace, preflight="on", preflight_timeout=3600.0)
    with OperatorThread(settings, clock=lambda: utc_now() + ahead):
        run.create()
        run.set_preflight(1, status)
    with OperatorThread(settings, clock=lambda: utc_now() + ahead):  # the next one sees a pod that runs already
        ahead += timedelta(seconds=3500)
        run.api.patch(f"{run.path}/{run.name}", {"metadata": {"labels": {"look": "again"}}})
        run.wait("a look", lambda status: status.get("phase") == "Preflight")
        assert run.status.get("failures", []) == []
        ahead += timedelta(seconds=101)
        run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"activeDeadlineSeconds": 9999}}})
        found = run.wait("its end", lambda status: status.get("failures"))["failures"][0]
    assert (found["class"], found["attempt"]) == ("Stalled", 0)


# Pods that nobody owns


def orphan(cp: devcluster.ControlPlane, run: Run) -> list[str]:
    """Deletes the Job of attempt 1 and lets its pods live. Returns their names."""
    names = [pod["metadata"]["name"] for pod in run.gang(1)]
    cp.kubectl("delete", "job", "run-1", f"--namespace={run.namespace}", "--cascade=orphan")
    return names


def train(run: Run) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")


def test_orphans_are_named_and_what_they_publish_counts(
    cp: devcluster.ControlPlane, run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, start_timeout=600.0)):
        train(run)
        names = orphan(cp, run)
        status = run.wait("the reason", lambda status: status["reason"] == "OrphanedPods")
        assert (status["phase"], status["attempt"]) == ("Restarting", 1)
        assert status["failures"][0]["reason"] == "JobDeleted"
        message = run.condition("Ready")["message"]
        assert f"kubectl delete pod {' '.join(names)}" in message
        events = eventually("an Event", lambda: [e for e in run.events() if e["reason"] == "OrphanedPods"])
        assert events[0]["type"] == "Warning"
        run.set_succeeded(1)
        assert run.wait_phase("Succeeded")["attempt"] == 1


def test_orphans_that_end_let_the_next_attempt_go_on(
    cp: devcluster.ControlPlane, run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, start_timeout=600.0)):
        train(run)
        names = orphan(cp, run)
        run.wait("the reason", lambda status: status["reason"] == "OrphanedPods")
        run.set_ended(1, 1, 75, termination("Checkpointed", rank=1))
        run.api.delete(f"/api/v1/namespaces/{namespace}/pods/{names[0]}", gracePeriodSeconds=0)
        run.wait("attempt 2", lambda status: status.get("attempt") == 2)


def test_orphans_do_not_hold_up_a_run_for_ever(cp: devcluster.ControlPlane, run: Run, operator: OperatorThread) -> None:
    train(run)
    names = orphan(cp, run)
    run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    run.set_running(2)
    run.wait("the names", lambda status: status["phase"] == "Running" and names[0] in str(status["conditions"]))
    run.set_succeeded(1)  # the orphans were first
    run.wait_phase("Succeeded")
    eventually("attempt 2 is ended", lambda: not run.jobs())


def test_a_copy_of_a_pod_is_none_of_the_gang(run: Run, operator: OperatorThread, namespace: str) -> None:
    """kubectl debug --copy-to --keep-labels"""
    train(run)
    first, original = run.gang(1)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "securityContext": original["spec"]["securityContext"],
        "containers": [
            {
                "name": "trainer",
                "image": "i",
                "securityContext": original["spec"]["containers"][0]["securityContext"],
            }
        ],
    }
    metadata = {"name": "debug-copy", "labels": original["metadata"]["labels"]}
    copy = run.api.create(f"/api/v1/namespaces/{namespace}/pods", {"metadata": metadata, "spec": spec})
    try:
        run.set_pod(copy, ended(65, termination("BadData", "of the copy")))
    except Exception as error:  # noqa: BLE001 - the Job controller may have taken it away already
        assert "404" in str(error)  # noqa: PT017
    run.set_pod(original, ended(74, termination("StoreUnavailable", "503", rank=1)))
    run.set_pod(first, ended(73, termination("PeerLost", "closed", rank=0)))
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert [failure["class"] for failure in status["failures"]] == ["StoreUnavailable"]

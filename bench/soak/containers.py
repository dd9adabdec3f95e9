"""Containers that others put into the pods, and what kubelets say of them. Pure.

A mesh or an agent does so by a webhook. An ordinary sidecar runs on when the trainer has ended, and its pod with it; a
native one, an init container that is restarted, is ended by the kubelet.
"""

import copy
from typing import Any

from bench.scale.client import Raw
from bench.soak.stories import NATIVE_SIDECAR, SIDECAR
from lora_api.run import CONTAINER_NAME

NAME = "istio-proxy"
"""Kubelets sort what they say of containers by name, so that this one comes before the trainer's."""

_OVER = ("Succeeded", "Failed")


def inject(pod: Raw, sidecar: str) -> list[Raw]:
    """The JSON patch that puts ``sidecar`` into ``pod``."""
    trainer = next(item for item in pod["spec"]["containers"] if item["name"] == CONTAINER_NAME)
    container: Raw = {"name": NAME, "image": "proxy", "securityContext": copy.deepcopy(trainer["securityContext"])}
    if sidecar == SIDECAR:
        return [{"op": "add", "path": "/spec/containers/0", "value": container}]
    if sidecar == NATIVE_SIDECAR:
        there = pod["spec"].get("initContainers", [])
        value = [{**container, "restartPolicy": "Always"}, *there]
        return [{"op": "add", "path": "/spec/initContainers", "value": value}]
    return []


def find_sidecar(pod: Raw) -> str:
    """The kind of sidecar that is in ``pod``; empty where none is."""
    if any(item["name"] == NAME for item in pod["spec"].get("containers", ())):
        return SIDECAR
    return NATIVE_SIDECAR if any(item["name"] == NAME for item in pod["spec"].get("initContainers", ())) else ""


def find_trainer(pod: Raw) -> Raw:
    """The state of the trainer's container."""
    states = (item["state"] for item in pod["status"].get("containerStatuses") or () if item["name"] == CONTAINER_NAME)
    state: Raw = next(states, {})
    return state


def has_spoken(pod: Raw) -> bool:
    """Whether the trainer has ended, and the pod has not."""
    return "terminated" in find_trainer(pod) and pod["status"].get("phase") not in _OVER


def show_all(pod: Raw, status: Raw, *, asked: bool) -> Raw:
    """``status``, which speaks of the trainer alone, with what there is to say of the sidecar of ``pod``.

    ``asked``: the pod was asked to stop.
    """
    sidecar = find_sidecar(pod)
    if not sidecar or "containerStatuses" not in status:
        return status
    over = status["phase"] in _OVER
    if sidecar == NATIVE_SIDECAR:
        return {**status, "initContainerStatuses": [_state(over=over)]}
    runs_on = over and not asked and "conditions" not in status  # an eviction ends the whole pod
    phase = "Running" if runs_on else status["phase"]
    return {
        **status,
        "phase": phase,
        "containerStatuses": [_state(over=over and not runs_on), *status["containerStatuses"]],
    }


def compute_over(pod: Raw) -> Raw:
    """The status of a pod whose trainer had ended, and whose sidecar ends now."""
    trainer: list[Any] = [item for item in pod["status"]["containerStatuses"] if item["name"] == CONTAINER_NAME]
    failed = trainer[0]["state"]["terminated"].get("exitCode", 0)
    return {"phase": "Failed" if failed else "Succeeded", "containerStatuses": trainer}


def _state(*, over: bool) -> Raw:
    state: Raw = {"terminated": {"exitCode": 0, "reason": "Completed"}} if over else {"running": {}}
    return {"name": NAME, "image": "proxy", "imageID": "", "ready": not over, "restartCount": 0, "state": state}

"""A LoRAFineTune on a real API server, with pods whose status the test writes: there is no kubelet."""

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from lora_operator.names import RUN_ANNOTATION
from tests.support.api import Api, ApiError, Raw
from tests.support.wait import PATIENCE, eventually


def adapter_of(
    namespace: str, name: str = "run", digest: str = "a" * 64, store: str = "s3://models/adapters"
) -> dict[str, Any]:
    """What a run publishes."""
    return {
        "uri": f"{store}/{namespace}/{name}/sha256-{digest}",
        "digest": f"sha256:{digest}",
        "version": 1,
        "servedName": f"{name}-v1",
        "rank": 8,
        "servingMaxLoraRank": 8,
        "sizeBytes": 1000,
        "evalLossBefore": 3.0,
        "evalLossAfter": 0.1,
    }


SETTLED = {
    "pins": {
        "baseModel": {"uri": "s3://models/base", "digest": "sha256:" + "b" * 64, "files": 3, "sizeBytes": 1000},
        "train": {"uri": "s3://models/train.jsonl", "digest": "sha256:" + "c" * 64, "files": 1, "sizeBytes": 10},
    },
    "plan": {"microBatchSize": 2, "processes": 2, "shardSize": 2, "totalSteps": 18, "tokensPerEpoch": 480},
}

SPEC: Raw = {
    "baseModel": {"uri": "s3://models/base"},
    "dataset": {"train": {"uri": "s3://models/train.jsonl"}},
    "training": {"maxSteps": 18, "globalBatchSize": 8, "microBatchSize": 4},
    "parallelism": {"nodes": 2, "gpusPerNode": 0},
    "publish": {"store": "s3://models/adapters"},
}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def termination(failure_class: str | None = None, message: str = "", **more: Any) -> str:
    """The trainer's last words; after success with the ``adapter``."""
    words = {"version": 1, "outcome": "failed" if failure_class else "succeeded", "at": now(), **more}
    if failure_class:
        words |= {"class": failure_class, "message": message}
    return json.dumps(words)


def settled(message: str = "48 records; 18 steps") -> str:
    """The last words of a preflight that passed."""
    return json.dumps({"version": 1, "outcome": "succeeded", "at": now(), "message": message, "preflight": SETTLED})


class Run:
    """One run and its gang."""

    def __init__(self, api: Api, namespace: str, name: str = "run") -> None:
        self.api = api
        self.namespace = namespace
        self.name = name
        self.path = f"/apis/lorafinetune.io/v1alpha1/namespaces/{namespace}/lorafinetunes"

    def create(self, change: Callable[[Raw], None] = lambda spec: None) -> "Run":
        spec = copy.deepcopy(SPEC)
        change(spec)
        body = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "LoRAFineTune", "spec": spec}
        self.api.create(self.path, {**body, "metadata": {"name": self.name}})
        return self

    @property
    def raw(self) -> Raw:
        return self.api.get(f"{self.path}/{self.name}")

    @property
    def adapter(self) -> Raw:
        """What it publishes."""
        return adapter_of(self.namespace, self.name)

    @property
    def status(self) -> Raw:
        return dict(self.raw.get("status") or {})

    def delete(self) -> None:
        self.api.delete(f"{self.path}/{self.name}")

    def condition(self, kind: str) -> Raw:
        return next((item for item in self.status.get("conditions", []) if item["type"] == kind), {})

    def wait(self, what: str, check: Callable[[Raw], Any], seconds: float = PATIENCE) -> Raw:
        def look() -> Raw:
            status = self.status
            assert check(status), json.dumps({k: v for k, v in status.items() if k != "progress"})[:3000]
            return status

        return eventually(f"{self.name}: {what}", look, seconds)

    def wait_phase(self, phase: str, seconds: float = PATIENCE) -> Raw:
        return self.wait(f"phase {phase}", lambda status: status.get("phase") == phase, seconds)

    def jobs(self) -> list[Raw]:
        return self._owned(f"/apis/batch/v1/namespaces/{self.namespace}/jobs")

    def services(self) -> list[Raw]:
        return self._owned(f"/api/v1/namespaces/{self.namespace}/services")

    def document(self, part: int | str) -> Raw:
        """What the pods of an attempt, or of a preflight such as "pre1", are told, as long as their Job is there."""
        (job,) = [job for job in self.jobs() if job["metadata"]["name"] == f"{self.name}-{part}"]
        told: Raw = json.loads(job["spec"]["template"]["metadata"]["annotations"][RUN_ANNOTATION])
        return told

    def configmaps(self) -> list[Raw]:
        """What earlier releases gave to the pods."""
        return self._owned(f"/api/v1/namespaces/{self.namespace}/configmaps")

    def policies(self) -> list[Raw]:
        return self._owned(f"/apis/networking.k8s.io/v1/namespaces/{self.namespace}/networkpolicies")

    def events(self) -> list[Raw]:
        path = f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events?fieldSelector=regarding.name={self.name}"
        return sorted(self.api.items(path), key=lambda event: event["eventTime"] or "")

    def pods(self, attempt: int) -> list[Raw]:
        """The pods of an attempt that are there now, by index."""
        selector = f"lorafinetune.io/name={self.name},lorafinetune.io/attempt={attempt}"
        pods = self.api.items(f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}")
        return sorted(pods, key=lambda pod: pod["metadata"]["name"])

    def gang(self, attempt: int, size: int = 2) -> list[Raw]:
        """The pods of an attempt, once the Job controller has made all of them."""

        def look() -> list[Raw]:
            pods = self.pods(attempt)
            assert len(pods) == size, f"{len(pods)} pods"
            return pods

        return eventually(f"{size} pods of attempt {attempt}", look)

    def preflight_pods(self, number: int) -> list[Raw]:
        """The pods of a preflight that are there now."""
        selector = f"lorafinetune.io/name={self.name},lorafinetune.io/preflight={number}"
        return self.api.items(f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}")

    def set_preflight(self, number: int, status: Raw) -> None:
        """Gives the pod of a preflight a status, once the Job controller has made it."""
        [pod] = eventually(f"the pod of preflight {number}", lambda: self.preflight_pods(number))
        self.set_pod(pod, status)

    def set_pod(self, pod: Raw, status: Raw) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/status"
        self.api.patch(path, {"status": status})

    def set_running(self, attempt: int, size: int = 2) -> None:
        for pod in self.gang(attempt, size):
            self.set_pod(pod, running())

    def set_ended(self, attempt: int, index: int, exit_code: int, message: str = "", reason: str = "Error") -> None:
        pod = next(
            pod for pod in self.gang(attempt) if pod["metadata"]["name"].startswith(f"{self.name}-{attempt}-{index}-")
        )
        self.set_pod(pod, ended(exit_code, message, reason))

    def set_failed(self, attempt: int, failure_class: str, exit_code: int, message: str = "it broke") -> None:
        """Rank 1 fails, and rank 0 loses its peer."""
        self.set_ended(attempt, 1, exit_code, termination(failure_class, message, rank=1))
        self.set_ended(attempt, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))

    def set_succeeded(self, attempt: int, **published: str) -> None:
        adapter = adapter_of(self.namespace, self.name, **published)
        self.set_ended(attempt, 1, 0, reason="Completed")
        self.set_ended(attempt, 0, 0, termination(adapter=adapter), "Completed")

    def _owned(self, path: str) -> list[Raw]:
        items = self.api.items(f"{path}?labelSelector=lorafinetune.io/name={self.name}")
        return sorted(items, key=lambda item: item["metadata"]["name"])


def running() -> Raw:
    started = {"running": {"startedAt": now()}}
    return {
        "phase": "Running",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [_container(started, ready=True)],
    }


def waiting(reason: str, message: str) -> Raw:
    return {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [_container({"waiting": {"reason": reason, "message": message}})],
    }


def unschedulable(message: str) -> Raw:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def ended(exit_code: int, message: str = "", reason: str = "Error") -> Raw:
    state = {"exitCode": exit_code, "reason": reason, "message": message, "finishedAt": now()}
    return {
        "phase": "Failed" if exit_code else "Succeeded",
        "containerStatuses": [_container({"terminated": state})],
    }


def _container(state: Raw, *, ready: bool = False) -> Raw:
    return {"name": "trainer", "image": "i", "imageID": "", "ready": ready, "restartCount": 0, "state": state}


__all__ = [
    "SETTLED",
    "ApiError",
    "Run",
    "adapter_of",
    "ended",
    "running",
    "settled",
    "termination",
    "unschedulable",
    "waiting",
]

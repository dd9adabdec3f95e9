"""Runs in every state that an upgrade may find, and what of them no other release may touch."""

import copy
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.skew.processes import Operator
from tests.support.api import Api, Raw
from tests.support.runs import Run
from tests.support.wait import eventually

STATES = ("finished", "running", "queued", "suspended", "failed")
PHASES = {
    "finished": "Succeeded",
    "running": "Running",
    "queued": "Queued",
    "suspended": "Suspended",
    "failed": "Failed",
}
SUMMARY = ("Ready", "Reconciling", "Stalled", "Complete", "Failed", "Running", "Published", "Scheduled")


def bring_about(api: Api, namespace: str) -> dict[str, Run]:
    """One run in each state, with the help of the operator that is there."""
    runs = {name: Run(api, namespace, name) for name in STATES}
    runs["finished"].create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 86_400}))
    runs["queued"].create(lambda spec: spec.update(runPolicy={"queueName": "team"}))
    for name in ("running", "suspended", "failed"):
        runs[name].create()
    for name in ("finished", "running", "suspended", "failed"):
        runs[name].set_running(1)
        runs[name].wait_phase("Running")
    runs["finished"].set_succeeded(1)
    runs["failed"].set_failed(1, "BadData", 65, "data.jsonl:7: no messages")
    suspend(runs["suspended"], 1)
    for name, run in runs.items():
        run.wait_phase(PHASES[name])
    eventually("the suspended run's pods are gone", lambda: not runs["suspended"].pods(1), 60)
    runs["suspended"].wait("it is suspended", lambda status: status["reason"] == "Suspended")
    return runs


def suspend(run: Run, attempt: int) -> None:
    """Suspends a run. Its pods have no node, so there is no kubelet that they would have to wait for."""
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": True}}})
    run.wait("it is being suspended", lambda status: status.get("suspendedAttempt") == attempt)


@dataclass(frozen=True)
class Facts:
    """What no release may lose, change or make again of a run."""

    attempt: int
    adapter: Any
    failures: tuple[tuple[int, str, str], ...]
    conditions: tuple[tuple[str, str, str], ...]
    children: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, run: Run) -> "Facts":
        """As the API server has them."""
        status = run.status
        selector = f"?labelSelector=lorafinetune.io/name={run.name}"
        pods = run.api.items(f"/api/v1/namespaces/{run.namespace}/pods{selector}")
        children = [*run.jobs(), *run.services(), *run.configmaps(), *pods]
        return cls(
            attempt=status["attempt"],
            adapter=status.get("adapter"),
            failures=tuple((one["attempt"], one["class"], one["message"]) for one in status["failures"]),
            conditions=tuple(
                sorted((item["type"], item["status"], item["reason"]) for item in status["conditions"]
                       if item["type"] in SUMMARY)
            ),
            children=tuple(sorted((item["metadata"]["name"], item["metadata"]["uid"]) for item in children)),
        )  # fmt: skip


def look_at_all(runs: dict[str, Run], operator: Operator) -> None:
    """Lets the operator look at every run several times, at each after a change that means nothing."""
    for number in range(2):
        before = operator.looks("ok")
        for run in runs.values():
            note = {"metadata": {"annotations": {"looked-at": f"{number}-{time.monotonic()}"}}}
            run.api.patch(f"{run.path}/{run.name}", note)
        eventually("every run is looked at", partial(_has_looked, operator, before + len(runs)))
    assert operator.looks("error") == 0, operator.log


def _has_looked(operator: Operator, times: int) -> bool:
    return operator.looks("ok") >= times


def snapshot(run: Run) -> dict[str, Raw | list[Raw]]:
    """The run and its children as documents."""
    selector = f"?labelSelector=lorafinetune.io/name={run.name}"
    pods = run.api.items(f"/api/v1/namespaces/{run.namespace}/pods{selector}")
    whole = {"run": run.raw, "jobs": run.jobs(), "pods": pods, "configmaps": run.configmaps()}
    return {name: _without_managed_fields(document) for name, document in whole.items()}


def _without_managed_fields(document: Any) -> Any:
    document = copy.deepcopy(document)
    for item in document if isinstance(document, list) else [document]:
        item["metadata"].pop("managedFields", None)
    return document

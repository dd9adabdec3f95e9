"""Objects for tables of cases: short to write, with everything that a case is not about at a sane default."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from lora_api import ClusterLoRARuntime, LoRAFineTune
from lora_operator.diagnosis.firstseen import started_seen
from lora_operator.state.observed import Observed, stop_seen
from lora_operator.state.reports import Reports
from lora_operator.watched.views import Ended, JobView, PodView

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
ADAPTER = {
    "uri": "s3://models/adapters/team/tickets/sha256-" + "a" * 64,
    "digest": "sha256:" + "a" * 64,
    "version": 3,
    "servedName": "tickets-v3",
    "rank": 8,
    "servingMaxLoraRank": 8,
    "sizeBytes": 1000,
}


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def a_run(*, status: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, **spec: Any) -> LoRAFineTune:
    """Two nodes on the CPU."""
    values = {
        "baseModel": {"uri": "s3://models/base"},
        "dataset": {"train": {"uri": "s3://models/train.jsonl"}},
        "training": {"maxSteps": 18, "globalBatchSize": 8, "microBatchSize": 4},
        "parallelism": {"nodes": 2, "gpusPerNode": 0},
        "publish": {"store": "s3://models/adapters"},
    }
    names = {"name": "tickets", "namespace": "team", "uid": "run-uid", "generation": 1, "resourceVersion": "100"}
    return LoRAFineTune.model_validate(
        {"metadata": {**names, **(metadata or {})}, "spec": {**values, **spec}, "status": status or {}}
    )


def a_runtime(name: str = "default", generation: int = 1, **spec: Any) -> ClusterLoRARuntime:
    return ClusterLoRARuntime.model_validate({"metadata": {"name": name, "generation": generation}, "spec": spec})


def a_job(attempt: int = 1, **changes: Any) -> JobView:
    job = JobView(
        namespace="team",
        name=f"tickets-{attempt}",
        uid=f"job-{attempt}",
        version=1,
        run="tickets",
        attempt=attempt,
        owner_uid="run-uid",
        created=ago(100),
        size=2,
        started=None if changes.get("suspended") else changes.get("created", ago(100)),
    )
    return replace(job, **changes)


def a_preflight(number: int = 1, **changes: Any) -> JobView:
    return a_job(
        0, **{"size": 1, "name": f"tickets-pre{number}", "uid": f"pre-{number}", "preflight": number, **changes}
    )


def a_pod(index: int = 0, attempt: int = 1, **changes: Any) -> PodView:
    """A pod that has not been scheduled."""
    pod = PodView(
        namespace="team",
        name=f"tickets-{attempt}-{index}",
        uid=f"pod-{attempt}-{index}",
        version=1,
        run="tickets",
        attempt=attempt,
        index=index,
        job_uid=f"job-{attempt}",
        created=ago(90),
    )
    return replace(pod, **changes)


def running(index: int = 0, attempt: int = 1, **changes: Any) -> PodView:
    return a_pod(index, attempt, **{"scheduled": True, "phase": "Running", "running": True, **changes})


def taken(index: int, **changes: Any) -> PodView:
    """A pod that the Job controller lets go and deletes, because its Job was suspended; it has not ended."""
    return running(index, **{"deleting_at": ago(-100), "tracked": False, **changes})


def waiting(index: int, reason: str, message: str = "", **changes: Any) -> PodView:
    return a_pod(index, scheduled=True, waiting_reason=reason, waiting_message=message, **changes)


def ended(
    index: int = 0,
    code: int = 70,
    message: str = "",
    *,
    reason: str = "Error",
    at: datetime | None = NOW,
    **changes: Any,
) -> PodView:
    return a_pod(
        index,
        **{
            "scheduled": True,
            "phase": "Failed" if code else "Succeeded",
            "ended": Ended(exit_code=code, reason=reason, message=message, at=at),
            **changes,
        },
    )


def said(failure_class: str, message: str = "it broke", at: datetime = NOW, **more: Any) -> str:
    """A termination message of a failure."""
    words = {"version": 1, "outcome": "failed", "class": failure_class, "message": message, "at": stamp(at)}
    return json.dumps({**words, **more})


def sighted(what: str, seconds: float) -> Reports:
    """An operator that saw ``what`` first so many seconds ago."""
    return Reports(run_uid="run-uid", seen={what: ago(seconds)})


def published() -> str:
    """A termination message of success."""
    return json.dumps({"version": 1, "outcome": "succeeded", "at": stamp(NOW), "adapter": ADAPTER})


def settled(message: str = "48 records", **outcome: Any) -> str:
    """A termination message of a preflight that passed."""
    words = {"version": 1, "outcome": "succeeded", "message": message, "at": stamp(NOW), "preflight": outcome}
    return json.dumps(words)


def failure(attempt: int = 1, failure_class: str = "Internal") -> dict[str, Any]:
    return {"attempt": attempt, "class": failure_class, "at": stamp(ago(10))}


def condition(kind: str, status: str = "True", reason: str = "Because", at: datetime | None = None) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": stamp(at or ago(50))}


def seen(
    run: LoRAFineTune,
    *parts: JobView | PodView,
    reports: Reports | None = None,
    runtime: ClusterLoRARuntime | None = None,
) -> Observed:
    """What an operator sees of ``run``. It saw Jobs start, and pods asked to stop, when these say so."""
    reports = reports or Reports(run_uid=run.metadata.uid)
    times = {stop_seen(part): part.deleting_at for part in parts if isinstance(part, PodView) and part.deleting_at}
    jobs = [part for part in parts if isinstance(part, JobView)]
    times |= {started_seen(job): job.started for job in jobs if job.started}
    reports = replace(reports, seen={**times, **reports.seen})
    return Observed(
        run=run,
        jobs={job.attempt: job for job in jobs if job.owner_uid == run.metadata.uid and not job.preflight},
        preflights={job.preflight: job for job in jobs if job.preflight},
        pods=tuple(part for part in parts if isinstance(part, PodView)),
        job_uids=frozenset(job.uid for job in jobs),
        reports=reports,
        runtime=runtime,
    )

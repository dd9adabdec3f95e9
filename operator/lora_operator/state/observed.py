"""Observed: all that a decision about one run may look at."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from lora_api import ClusterLoRARuntime, LoRAFineTune
from lora_operator.state.facts import has_passed, has_started, is_finished, is_over
from lora_operator.state.reports import STOP, Reports
from lora_operator.watched.views import JobView, PodView


@dataclass(frozen=True)
class Observed:
    """A run, its Jobs by attempt, those of its preflights by number, and every pod that carries its name.

    ``runtime`` is looked up for a run that has not begun, and the labels of its namespace where the runtime asks for
    them; ``None``: they could not be read.
    """

    run: LoRAFineTune
    jobs: Mapping[int, JobView] = field(default_factory=dict)
    preflights: Mapping[int, JobView] = field(default_factory=dict)
    pods: tuple[PodView, ...] = ()
    job_uids: frozenset[str] = frozenset()
    reports: Reports = field(default_factory=Reports)
    runtime: ClusterLoRARuntime | None = None
    namespace_labels: Mapping[str, str] | None = None

    def has_begun(self) -> bool:
        """Whether the run has taken its runtime, or something was created for it without one."""
        return self.run.status.runtime is not None or self.has_launched()

    def has_launched(self) -> bool:
        """Whether a Job was created for the run."""
        status = self.run.status
        return bool(has_started(status) or self.all_jobs())

    def gang(self, job: JobView) -> list[PodView]:
        """The pods of ``job``, rank by rank; where an index has several, the newest of those that stay.

        A Job controller that does not see a pod which it has made makes another one, and takes one of them away later.
        Pods that were taken back with the quota of ``job`` are left out, and so are copies beside what they are of.
        """
        latest: dict[int, PodView] = {}
        for pod in sorted(self.pods, key=lambda pod: (not pod.copied, _stays(pod), pod.created, pod.name)):
            if pod.job_uid == job.uid and not is_taken_back(pod, job):
                latest[pod.index] = pod
        return [latest[index] for index in sorted(latest)]

    def stopping(self, job: JobView) -> list[PodView]:
        """Pods that were taken back with the quota of ``job``, and have not ended yet."""
        return [pod for pod in self.pods if pod.job_uid == job.uid and is_taken_back(pod, job) and not pod.has_ended]

    def leftovers(self) -> list[PodView]:
        """Pods that still hold nodes though their Job is gone.

        The orphan of a preflight is none: it holds no GPU and writes no checkpoint.
        """
        lost = [pod for pod in self.pods if pod.job_uid and pod.holds_node and pod.job_uid not in self.job_uids]
        return [pod for pod in lost if pod.attempt or not pod.orphaned]

    def orphans(self) -> list[PodView]:
        """Leftovers that nobody deletes."""
        return [pod for pod in self.leftovers() if pod.deleting_at is None]

    def all_jobs(self) -> list[JobView]:
        """Every Job of the run, in the order in which they were made."""
        return [jobs[number] for jobs in (self.preflights, self.jobs) for number in sorted(jobs)]

    def current_job(self) -> JobView | None:
        """The Job that runs, or that ran last."""
        return next(reversed(self.all_jobs()), None)

    def live_job(self) -> JobView | None:
        """The Job that has no verdict yet."""
        job, status = self.current_job(), self.run.status
        if job is None or is_finished(status):
            return None
        if job.preflight:
            return None if job.preflight <= status.failed_preflights or has_passed(status) else job
        return None if is_over(status, job.attempt) else job

    def is_short_of_pods(self, job: JobView) -> bool:
        """Whether the Job controller has not made all pods of ``job``."""
        indexes = {pod.index for pod in self.gang(job)} | job.failed_indexes | job.completed_indexes
        return len(indexes) < job.size


def is_taken_back(pod: PodView, job: JobView) -> bool:
    """Whether ``pod`` was deleted because ``job`` was suspended, so that its end counts for nothing.

    The Job controller lets go of the pods that it deletes, and their indexes run again once the Job is let go. One that
    ended before it could be deleted is counted, and so is one that somebody else deletes.
    """
    let_go = (pod.gone or pod.deleting_at is not None) and not pod.tracked
    counted = pod.index in job.failed_indexes | job.completed_indexes
    return job.was_suspended and let_go and not counted


def stop_seen(pod: PodView) -> str:
    """The sighting that ``pod`` was asked to stop."""
    return f"{STOP}{pod.uid}"


def ends_by(pod: PodView, seen: Mapping[str, datetime], now: datetime) -> datetime | None:
    """When the kubelet has to have ended ``pod``, by our clock; ``None``: nobody asked it to stop.

    The API server tells it too, by its own clock, which may be minutes off.
    """
    if pod.deleting_at is None:
        return None
    return seen.get(stop_seen(pod), now) + timedelta(seconds=pod.stop_seconds)


def seconds_to_leaving(
    pods: Iterable[PodView], now: datetime, grace: float, seen: Mapping[str, datetime]
) -> float | None:
    """Seconds until the last of ``pods`` is given up on, which the kubelet had to have ended ``grace`` before."""
    due = [ends_by(pod, seen, now) or now for pod in pods]
    waits = [(at + timedelta(seconds=grace) - now).total_seconds() for at in due]
    return max((wait for wait in waits if wait > 0), default=None)


def _stays(pod: PodView) -> bool:
    return not pod.gone and pod.deleting_at is None

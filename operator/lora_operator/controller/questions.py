"""What has to be looked up before a run is decided on, since the watches cannot know it or may be late. All pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from lora_operator.clock import is_due
from lora_operator.lifecycle.failing import find_failing
from lora_operator.lifecycle.preflight import needs_preflight
from lora_operator.lifecycle.runtime import asks_for_namespace
from lora_operator.settings import RunSettings
from lora_operator.state.facts import is_finished, is_over
from lora_operator.state.observed import Observed
from lora_operator.watched.views import JobView, PodView


@dataclass(frozen=True)
class RunAsItIs:
    """The run itself: another operator may have written to it."""


@dataclass(frozen=True)
class JobOf:
    """The Job of ``attempt``: another operator may have made it."""

    attempt: int


@dataclass(frozen=True)
class JobAsItIs:
    """A Job whose pod was deleted: its queue may have suspended it."""

    job: JobView


@dataclass(frozen=True)
class PodsOf:
    """The pods of a Job, where no watch has shown what became of some of them."""

    job: JobView


@dataclass(frozen=True)
class Leftovers:
    """Pods that stay though their Job is gone: no watch may have told that they went."""

    names: frozenset[str]


@dataclass(frozen=True)
class NamespaceLabels:
    """The labels of the run's namespace, which a runtime asks for. The answer is no part of what is watched."""


Question: TypeAlias = RunAsItIs | JobOf | JobAsItIs | PodsOf | Leftovers | NamespaceLabels
Answers = Mapping[Question, Any]
"""What was asked, with the answer where it is not in the cache by now."""


def questions(observed: Observed, now: datetime, settings: RunSettings) -> Iterator[Question]:
    """What to look up now. After the answers there may be others."""
    if not observed.has_begun() and asks_for_namespace(observed.runtime):
        yield NamespaceLabels()
    attempt = missing_attempt(observed)
    if attempt is not None:
        yield JobOf(attempt)
    bereft = deleted_preflight(observed)
    if bereft is not None:
        yield JobAsItIs(bereft)
    job = unseen_ends(observed) or blames_silence(observed, now, settings)
    if job is not None:
        yield PodsOf(job)
    pods, since = forgotten_pods(observed), observed.reports.forgotten_since
    if pods and since is not None and is_due(since, now, settings.failure_grace):
        yield Leftovers(frozenset(pod.name for pod in pods))
    if lacks_preflight(observed, settings):
        yield RunAsItIs()


def missing_attempt(observed: Observed) -> int | None:
    """The attempt whose Job was made and is not there, though nothing says that the attempt has ended."""
    status = observed.run.status
    over = is_finished(status) or is_over(status, status.attempt)
    if observed.run.metadata.deletion_timestamp or over or not status.attempt or status.attempt in observed.jobs:
        return None
    return status.attempt


def lacks_preflight(observed: Observed, settings: RunSettings) -> bool:
    """Whether the preflight that counts is not there, though somebody has looked at the run before.

    It may have failed: the watch of runs, which tells so, may be later than that of Jobs, if another operator is there.
    """
    status = observed.run.status
    if observed.run.metadata.deletion_timestamp or is_finished(status) or not status.conditions:
        return False
    number = status.failed_preflights + 1
    return needs_preflight(observed, settings) and all(other > number for other in observed.preflights)


def deleted_preflight(observed: Observed) -> JobView | None:
    """A preflight whose pod is gone without a word. A gang has its moment, in which the watch of Jobs catches up."""
    job = observed.live_job()
    if job is None or not job.preflight or job.suspended or job.deleting:
        return None
    return job if any(pod.gone and pod.ended is None for pod in observed.gang(job)) else None


def unseen_ends(observed: Observed) -> JobView | None:
    """A Job without a verdict that has failed pods which nobody has seen end, or such a rank 0 that has succeeded.

    The watches of Jobs and of pods are apart, so news of a Job may come before those of its pods, most of all at start.
    A pod that is taken to be gone, or to be running, has no last words, and its gang would be judged without them.
    """
    job = observed.live_job()
    if job is None:
        return None
    heard = job.failed_indexes | (job.completed_indexes & {0})
    return None if heard <= {pod.index for pod in observed.gang(job) if pod.has_ended} else job


def blames_silence(observed: Observed, now: datetime, settings: RunSettings) -> JobView | None:
    """A Job one of whose pods is about to be blamed for saying nothing: the watch may be late."""
    job = observed.live_job()
    if job is None or job.preflight or not any(pod.has_ended for pod in observed.gang(job)):
        return None
    failing = find_failing(observed, job, now, settings)
    return job if failing is not None and failing.blames_silence else None


def forgotten_pods(observed: Observed) -> list[PodView]:
    """Pods that hold up the next attempt, and that nobody deletes though their Job is gone: they may be gone too."""
    run = observed.run
    if run.metadata.deletion_timestamp or is_finished(run.status):
        return []
    return [pod for pod in observed.leftovers() if pod.deleting_at is None]

"""One read each: a log, Events, a queue. What was read comes back as a change of the reports."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from lora_api import LoRAFineTune, ProgressLine
from lora_api.run import CONTAINER_NAME
from lora_operator.evidence.kueue import fetch_queue_report
from lora_operator.evidence.logtext import tell_people
from lora_operator.evidence.memory import Change
from lora_operator.evidence.wants import EventsOfPods, LastWordsOf, ProgressOf, QueueOf, RefusalOf, Want
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import NotFoundError
from lora_operator.state.checkpoints import hear_checkpoint
from lora_operator.state.reports import (
    Reports,
    hear,
    hear_denied,
    hear_output,
    hear_pod_events,
    hear_queue,
    hear_refusal,
    hear_stage,
)
from lora_operator.status.progress import (
    compute_progress,
    compute_stage,
    describe_last,
    find_first_step,
    keep_believable,
    parse_log,
)
from lora_operator.watched.cache import Cache, Resource
from lora_operator.watched.views import PodView

logger = logging.getLogger(__name__)

PROGRESS_LINES = 200
LAST_LINES = 200
"""As many as are read for progress: most of them may be progress, which people get in a word."""


class Reader:
    """Asks kubelets, through the API server, and the API server itself."""

    def __init__(self, cache: Cache, kube: KubeClient, clock: Callable[[], datetime]) -> None:
        self._cache = cache
        self._kube = kube
        self._clock = clock

    async def read(self, run: LoRAFineTune, want: Want) -> Change:
        """Reads ``want`` of ``run``.

        Raises:
            KubeError: it was not given.
        """
        change = await self._read(run, want)
        permission, now = self.permission(want), self._clock()
        return lambda reports: hear_denied(change(reports), permission, None, now)

    async def _read(self, run: LoRAFineTune, want: Want) -> Change:
        match want:
            case ProgressOf(pod):
                asked_at = self._clock()
                log = await self._fetch_log(pod, PROGRESS_LINES)
                if log is None:
                    return self.build_unread(want, self._clock())
                return build_progress_change(run, pod, log, asked_at, self._clock())
            case LastWordsOf(pod):
                words = await self._fetch_log(pod, LAST_LINES)
                told = None if words is None else tell_people(words)
                return lambda reports: replace(reports, last_words={**reports.last_words, pod.uid: told})
            case RefusalOf(job):
                message = await self._kube.fetch_refusal(job.namespace, job.name, job.uid)
                now = self._clock()
                return lambda reports: hear_refusal(reports, message, now)
            case QueueOf(job):
                queue, now = await fetch_queue_report(self._kube, job), self._clock()
                return lambda reports: hear_queue(reports, queue, now)
            case EventsOfPods(job, pods):
                warnings = {pod.uid: await self._kube.fetch_warning(job.namespace, pod.uid) for pod in pods}
                now = self._clock()
                return lambda reports: hear_pod_events(reports, warnings, now)

    def build_unread(self, want: Want, now: datetime) -> Change:
        """What is known when ``want`` could not be read."""
        match want:
            case ProgressOf(pod):
                ended = pod.ended is not None
                return lambda reports: replace(
                    hear(reports, None, now), log_read_at=now, log_read_to_end=ended or reports.log_read_to_end
                )
            case LastWordsOf(pod):
                return lambda reports: replace(reports, last_words={**reports.last_words, pod.uid: None})
            case RefusalOf():
                return lambda reports: replace(reports, refusal_read_at=now)
            case QueueOf():
                return lambda reports: hear_queue(reports, reports.queue, now)
            case EventsOfPods():
                return lambda reports: replace(reports, pod_events_read_at=now)

    @staticmethod
    def permission(want: Want) -> str:
        """What the operator's role has to allow for ``want``."""
        match want:
            case ProgressOf() | LastWordsOf():
                return "get pods/log"
            case RefusalOf() | EventsOfPods():
                return "list events"
            case QueueOf():
                return "list workloads.kueue.x-k8s.io"

    @staticmethod
    def describe(want: Want) -> str:
        """For the log."""
        match want:
            case ProgressOf(pod) | LastWordsOf(pod):
                return f"{pod.namespace}/{pod.name}: log"
            case RefusalOf(job) | EventsOfPods(job, _):
                return f"{job.namespace}/{job.name}: Events"
            case QueueOf(job):
                return f"{job.namespace}/{job.name}: Workload"

    async def _fetch_log(self, pod: PodView, lines: int) -> str | None:
        """The end of a log; ``None``: the pod is gone, and no watch said so."""
        try:
            container = (pod.ended and pod.ended.init_container) or CONTAINER_NAME
            return await self._kube.fetch_log(pod.namespace, pod.name, container, lines)
        except NotFoundError:
            logger.info("%s/%s: the pod is gone, and no watch said so", pod.namespace, pod.name)
            self._cache.discard((Resource.PODS, pod.namespace, pod.name))
            return None


def build_progress_change(run: LoRAFineTune, pod: PodView, log: str, asked_at: datetime, read_at: datetime) -> Change:
    """What the end of rank 0's ``log`` tells. ``read_at`` may be much later than ``asked_at``, where the call hung."""
    said, output = parse_log(log)
    limit = float(run.spec.run_policy.stall_timeout_seconds)

    def change(reports: Reports) -> Reports:
        lines = keep_believable(said, reports.first_step)
        if len(lines) < len(said):
            logger.warning("pod %s tells of %d steps that cannot be", pod.name, len(said) - len(lines))
        new = hear_output(hear(reports, describe_last(lines), read_at), output, read_at, limit)
        new = hear_stage(new, compute_stage(lines, reports.stage), read_at)
        new = replace(new, log_read_at=asked_at, log_read_to_end=pod.ended is not None)
        return _add_progress(run, new, lines, read_at)

    return change


def _add_progress(run: LoRAFineTune, reports: Reports, lines: Sequence[ProgressLine], read_at: datetime) -> Reports:
    if not lines:
        return reports
    first = find_first_step(reports.first_step, lines)
    step = hear_checkpoint(lines, reports.checkpoint_step, run.spec.training.logging_steps)
    progress = compute_progress(
        reports.progress or run.status.progress,
        lines,
        logging_steps=run.spec.training.logging_steps,
        first=first,
        read_at=read_at,
    )
    return replace(reports, progress=progress, first_step=first, checkpoint_step=step)

"""What was read on top of the watches, and when. All pure.

It is kept in memory alone and read again after a restart. Each ``hear_`` takes what there was and what was read, and
returns what there is now.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from lora_api import Progress, ProgressLine
from lora_operator.state.workload import QueueReport

_DENIAL = re.compile(
    r"violates PodSecurity|denied (?:the )?request"  # Pod Security; a webhook, a ValidatingAdmissionPolicy
    r"|denied one or more images"  # ImagePolicyWebhook
    r"|failed quota: .*must specify"  # a ResourceQuota that wants limits
    r"|usage per (?:Container|Pod) is|max limit to request ratio per|must be less than or equal to"  # a LimitRange
    r"|unable to validate against any security context constraint"  # OpenShift
    r"|node label selector conflicts|conflicts with its namespace"  # PodNodeSelector, PodTolerationRestriction
    r'|^(?:Error creating: )?[\w.]+ "[^"]*" is invalid'
)
"""What admission says of what it does not want (Kubernetes 1.29 to 1.37), so that asking again does not help."""

_QUOTA = re.compile(r"exceed(?:ed|s)? [\w' -]*\bquota\b|\bquota (?:is |was )?exceeded")
"""A full ResourceQuota, a full ClusterResourceQuota of OpenShift, or one of a webhook, such as HNC's."""

Refuser = Literal["quota", "webhook", "priority", "policy", "unknown"]
"""Who refuses: a quota that is full, a webhook that does not answer, a missing PriorityClass, or a policy."""


def find_refuser(words: str) -> Refuser:
    """Who refuses a pod, or another object, with these ``words``.

    Whatever is no denial that is known may pass by itself, such as a time-out within the API server.
    """
    if _QUOTA.search(words):
        return "quota"
    if "failed calling webhook" in words:
        return "webhook"
    if "no PriorityClass with name" in words:
        return "priority"
    return "policy" if _DENIAL.search(words) else "unknown"


@dataclass(frozen=True)
class Refusal:
    """Why no pods are made for a Job, and since when this operator knows.

    The last refusal of a Job stays to be read when its pods are made, so the Job's own times tell nothing.
    """

    message: str
    since: datetime

    @property
    def kind(self) -> Refuser:
        """Who refuses."""
        return find_refuser(self.message)


STOP = "stop/"
"""What the sightings of pods that were asked to stop begin with: these outlive an attempt."""

JOB = "job/"
"""What the sightings of Jobs begin with: these outlive the pods."""

NO_ANSWER = 0
"""HTTP status of what was not answered in time."""


OLD = 600.0
"""Seconds after which a refusal that was not heard again is no more known to last: it is asked again each 30."""


@dataclass(frozen=True)
class RefusedChild:
    """The answer of the API server to an object that was to be created, at ``at`` and of this kind since ``since``.

    ``conflict``: its name is taken, and ``passing``: by something that is about to go.
    """

    kind: str
    name: str
    status: int
    words: str
    since: datetime
    at: datetime
    conflict: bool = False
    passing: bool = False

    def is_old(self, now: datetime) -> bool:
        """Whether nobody has asked for so long that it says nothing any more: the run was suspended meanwhile, say."""
        return (now - self.at).total_seconds() >= OLD

    @property
    def sort(self) -> tuple[str, int, bool, Refuser]:
        """What tells refusals of one sort: the words may name what is used by now."""
        return self.kind, self.status, self.passing, find_refuser(self.words)


@dataclass(frozen=True)
class Denial:
    """The API server does not let the operator do something, as it said at ``at`` for the ``times``-th time in a row.

    ``status`` is that of HTTP; 0: it did not answer in time.
    """

    words: str
    at: datetime
    status: int = 403
    times: int = 1


@dataclass(frozen=True)
class Reports:
    """What was read on top of the watches, and when.

    ``epoch`` counts what it was about: what is read of pods that others have taken the place of is dropped.
    ``denied`` has, by what was to be done or read, that the API server does not allow it.
    ``last_words`` are ends of logs by the uid of the pod; ``None``: it could not be read.
    """

    run_uid: str = ""
    epoch: int = 0
    stage: str = ""
    stage_since: datetime | None = None
    progress: Progress | None = None
    first_step: ProgressLine | None = None
    checkpoint_step: int | None = None
    last_word: str = ""
    last_output: str = ""
    heard_at: datetime | None = None
    log_read_at: datetime | None = None
    log_read_to_end: bool = False
    last_words: Mapping[str, str | None] = field(default_factory=dict)
    refusal: Refusal | None = None
    refusal_read_at: datetime | None = None
    pod_events: Mapping[str, str] = field(default_factory=dict)
    pod_events_read_at: datetime | None = None
    forgotten_since: datetime | None = None
    queue: QueueReport | None = None
    queue_read_at: datetime | None = None
    queue_changed_at: datetime | None = None
    failing_since: datetime | None = None
    failing_with: frozenset[str] | None = None
    """The uids of the pods that had begun to run when a failure was seen first."""
    awaiting_since: datetime | None = None
    short_of_room_since: datetime | None = None
    refused_child: RefusedChild | None = None
    denied: Mapping[str, Denial] = field(default_factory=dict)
    seen: Mapping[str, datetime] = field(default_factory=dict)
    """When this operator saw first what the pods are at (``diagnosis.sightings``)."""
    status_written_at: datetime | None = None


def hear(reports: Reports, word: str | None, now: datetime) -> Reports:
    """``reports`` after a look at the log whose last progress line is ``word``; empty: there is none yet.

    ``None``: the log could not be read. Then nobody knows, and a gang is not called silent for that.
    """
    if word is None:
        return replace(reports, heard_at=now)
    return replace(reports, last_word=word, heard_at=now) if word not in ("", reports.last_word) else reports


def hear_output(reports: Reports, output: str, now: datetime, limit: float) -> Reports:
    """``reports`` after a look at the log that ends with ``output``, a line which tells of no progress.

    It is life for the first ``limit`` seconds of a stage only: a library may warn of the same thing for ever.
    """
    if output in ("", reports.last_output):
        return reports
    since = reports.stage_since or now
    alive = (now - since).total_seconds() < limit
    return replace(reports, last_output=output, stage_since=since, heard_at=now if alive else reports.heard_at)


def hear_stage(reports: Reports, stage: str, now: datetime) -> Reports:
    """``reports`` once the trainer is known to be at ``stage``."""
    return reports if stage == reports.stage else replace(reports, stage=stage, stage_since=now)


def hear_refusal(reports: Reports, message: str | None, now: datetime) -> Reports:
    """``reports`` after a look at ``now`` for why pods are missing. Empty: nobody has said why.

    The words change with every try, as they name the pod and what is used; the time goes on while they are of one kind.
    """
    old, new = reports.refusal, Refusal(message, now) if message else None
    if old is not None and new is not None and old.kind == new.kind:
        new = replace(new, since=old.since)
    return replace(reports, refusal=new, refusal_read_at=now)


def hear_pod_events(reports: Reports, words: Mapping[str, str], now: datetime) -> Reports:
    """``reports`` after a look at ``now`` for why pods do not start: the newest warning by the uid of its pod.

    Those that were read last come last.
    """
    others = {uid: told for uid, told in reports.pod_events.items() if uid not in words}
    return replace(reports, pod_events={**others, **words}, pod_events_read_at=now)


def hear_queue(reports: Reports, queue: QueueReport | None, now: datetime | None) -> Reports:
    """``reports`` after Kueue was asked at ``now``. Without an answer and a time: it need not be asked any more."""
    changed = reports.queue_changed_at if queue == reports.queue and reports.queue_changed_at else now
    return replace(reports, queue=queue, queue_read_at=now, queue_changed_at=changed if now else None)


def hear_refused_child(reports: Reports, child: RefusedChild) -> Reports:
    """``reports`` after ``child`` was refused; the time of a refusal goes on while it is of one sort."""
    old = reports.refused_child
    if old is not None and old.sort == child.sort and not old.is_old(child.at):
        child = replace(child, since=old.since)
    return replace(reports, refused_child=child)


def hear_no_room(reports: Reports, now: datetime) -> Reports:
    """``reports`` after the API server took too long to create something, or has others to create before.

    What it said before stays what is known.
    """
    old = reports.refused_child
    silence = RefusedChild("Job", "", NO_ANSWER, "", since=now, at=now)
    afresh = old is None or old.conflict or old.is_old(now)
    return replace(reports, refused_child=silence if old is None or afresh else replace(old, at=now))


def hear_denied(reports: Reports, what: str, answer: str | None, now: datetime, status: int = 403) -> Reports:
    """``reports`` after ``what`` was tried, and is not allowed as ``answer`` says; ``None``: it is."""
    if answer is None and what not in reports.denied:
        return reports
    others = {other: denial for other, denial in reports.denied.items() if other != what}
    if answer is None:
        return replace(reports, denied=others)
    old = reports.denied.get(what)
    times = 1 if old is None else old.times + 1
    return replace(reports, denied=others | {what: Denial(answer, now, status, times)})


def _keep_seen(reports: Reports, *kinds: str) -> Mapping[str, datetime]:
    return {what: since for what, since in reports.seen.items() if what.startswith(kinds)}


def forget_pods(reports: Reports) -> Reports:
    """``reports`` without what the pods have said: others take their place."""
    kept = Reports(
        run_uid=reports.run_uid,
        epoch=reports.epoch,
        progress=reports.progress,
        checkpoint_step=reports.checkpoint_step,
        status_written_at=reports.status_written_at,
        queue=reports.queue,
        queue_read_at=reports.queue_read_at,
        queue_changed_at=reports.queue_changed_at,
        denied=reports.denied,
        seen=_keep_seen(reports, STOP, JOB),
    )
    return reports if kept == reports else replace(kept, epoch=reports.epoch + 1)


def forget_attempt(reports: Reports) -> Reports:
    """``reports`` for an attempt that is about to begin."""
    return Reports(
        run_uid=reports.run_uid,
        epoch=reports.epoch + 1,
        progress=reports.progress,
        checkpoint_step=reports.checkpoint_step,
        status_written_at=reports.status_written_at,
        denied=reports.denied,
        seen=_keep_seen(reports, STOP),
    )

"""What was read on top of the watches, and when. All pure."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from lora_api import Progress, ProgressLine
from lora_operator.state.workload import QueueReport


@dataclass(frozen=True)
class Refusal:
    """Why no pods are made for a Job, and since when this operator knows.

    The last refusal of a Job stays to be read when its pods are made, so the Job's own times tell nothing.
    """

    message: str
    since: datetime

    @property
    def kind(self) -> Literal["quota", "webhook", "priority", "policy"]:
        """Who refuses: a quota that is full, a webhook that does not answer, a missing PriorityClass, or a policy."""
        if "exceeded quota" in self.message:
            return "quota"
        if "failed calling webhook" in self.message:
            return "webhook"
        return "priority" if "no PriorityClass with name" in self.message else "policy"


@dataclass(frozen=True)
class Reports:
    """What was read on top of the watches, and when; kept in memory only, and read again after a restart."""

    run_uid: str = ""
    stage: str = ""
    progress: Progress | None = None
    first_step: ProgressLine | None = None
    checkpoint_step: int | None = None
    last_word: str = ""
    heard_at: datetime | None = None
    log_read_at: datetime | None = None
    log_read_to_end: bool = False
    restored_at: datetime | None = None
    refusal: Refusal | None = None
    refusal_read_at: datetime | None = None
    forgotten_since: datetime | None = None
    queue: QueueReport | None = None
    queue_read_at: datetime | None = None
    queue_changed_at: datetime | None = None
    failing_since: datetime | None = None
    obstructed_since: datetime | None = None
    short_of_room_since: datetime | None = None
    status_written_at: datetime | None = None


def hear(reports: Reports, word: str | None, now: datetime) -> Reports:
    """``reports`` after a look at the log whose last progress line is ``word``; empty: there is none yet.

    ``None``: the log could not be read. Then nobody knows, and a gang is not called silent for that.
    """
    if word is None:
        return replace(reports, heard_at=now)
    return replace(reports, last_word=word, heard_at=now) if word not in ("", reports.last_word) else reports


def hear_refusal(reports: Reports, message: str | None, now: datetime) -> Reports:
    """``reports`` after a look at ``now`` for why pods are missing. Empty: nobody has said why.

    The words change with every try, as they name the pod and what is used; the time goes on while they are of one kind.
    """
    old, new = reports.refusal, Refusal(message, now) if message else None
    if old is not None and new is not None and old.kind == new.kind:
        new = replace(new, since=old.since)
    return replace(reports, refusal=new, refusal_read_at=now)


def hear_queue(reports: Reports, queue: QueueReport | None, now: datetime | None) -> Reports:
    """``reports`` after Kueue was asked at ``now``. Without an answer and a time: it need not be asked any more."""
    changed = reports.queue_changed_at if queue == reports.queue and reports.queue_changed_at else now
    return replace(reports, queue=queue, queue_read_at=now, queue_changed_at=changed if now else None)


def forget_pods(reports: Reports) -> Reports:
    """``reports`` without what the pods have said: others take their place."""
    return Reports(
        run_uid=reports.run_uid,
        progress=reports.progress,
        checkpoint_step=reports.checkpoint_step,
        status_written_at=reports.status_written_at,
        queue=reports.queue,
        queue_read_at=reports.queue_read_at,
        queue_changed_at=reports.queue_changed_at,
    )

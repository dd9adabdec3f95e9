"""Observed: all that a decision about one run may look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from lora_api import LoRAFineTune, Progress
from lora_operator.views import JobView, PodView


@dataclass(frozen=True)
class Reports:
    """What was read on top of the watches, and when; kept in memory only, and read again after a restart."""

    stage: str = ""
    progress: Progress | None = None
    log_read_at: datetime | None = None
    log_read_to_end: bool = False
    refused: str | None = None
    refusal_read_at: datetime | None = None
    failing_since: datetime | None = None
    status_written_at: datetime | None = None


@dataclass(frozen=True)
class Observed:
    """A run, its Jobs by attempt, and every pod that carries its name."""

    run: LoRAFineTune
    jobs: Mapping[int, JobView] = field(default_factory=dict)
    pods: tuple[PodView, ...] = ()
    job_uids: frozenset[str] = frozenset()
    reports: Reports = Reports()

    def gang(self, job: JobView) -> list[PodView]:
        """The pods of ``job``, rank by rank; where an index has several, the newest."""
        newest: dict[int, PodView] = {}
        for pod in sorted(self.pods, key=lambda pod: (pod.created, pod.name)):
            if pod.job_uid == job.uid:
                newest[pod.index] = pod
        return [newest[index] for index in sorted(newest)]

    def leftovers(self) -> list[PodView]:
        """Pods that are still there though their Job is not."""
        return [pod for pod in self.pods if not pod.gone and pod.job_uid not in self.job_uids]

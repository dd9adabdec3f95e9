"""A gang of which a pod has failed: what its pods show, and how long the others are still listened to. Pure."""

from dataclasses import dataclass
from datetime import datetime

from lora_api import FailureClass
from lora_operator.diagnosis.diagnose import ECHOES, diagnose_pods, find_silent, is_off, seconds_to_lost
from lora_operator.diagnosis.findings import Symptom
from lora_operator.policies.placement import not_started
from lora_operator.settings import RunSettings
from lora_operator.state.observed import Observed
from lora_operator.watched.views import JobView, PodView
from lora_operator.wording import name_pods


@dataclass(frozen=True)
class Failing:
    """What a gang shows that has failed, or is about to.

    ``pods`` are those that ran when the first one failed, ``late`` those that did not; ``silent`` the ones that say
    nothing while their peers have only lost a peer, ``leaving`` those that were asked to stop meanwhile. The peers
    are listened to for ``grace`` seconds in all; ``left`` of them are still to come, none once there is nobody left
    to speak.
    """

    symptoms: list[Symptom]
    pods: list[PodView]
    late: list[PodView]
    silent: list[PodView]
    leaving: list[PodView]
    grace: float
    left: float

    @property
    def is_heard(self) -> bool:
        """Whether the verdict is due."""
        return self.left <= 0

    @property
    def blames_silence(self) -> bool:
        """Whether the verdict is about a pod that says nothing, on a node that answers."""
        return self.is_heard and bool(self.silent) and not is_off(self.silent[0])

    @property
    def failed_beside_late_pods(self) -> bool:
        """Whether the gang was not whole when it failed: pods that were late have not failed by themselves."""
        by_themselves = {one.pod.uid for one in self.symptoms if one.pod and one.failure_class not in ECHOES}
        return any(pod.uid not in by_themselves for pod in self.late)

    def describe_wait(self) -> str:
        """What is waited for, as the end of a sentence."""
        if self.leaving:
            return f"for the end of {name_pods([pod.name for pod in self.leaving])}, asked to stop"
        silent = self.silent[0].name if self.silent else None
        awaited = f"a word of pod {silent} or of its node" if silent else "the last words of the other pods"
        return f"up to {self.grace:.0f} s for {awaited}"


def find_failing(observed: Observed, job: JobView, now: datetime, settings: RunSettings) -> Failing | None:
    """What the gang of ``job`` shows; ``None`` while no pod has failed.

    A peer that is silent is listened to for longer: it takes Kubernetes a while to notice that a node is gone. One that
    was asked to stop has its time to save a checkpoint, and is what the others have lost. The time counts from when
    this operator saw the failure: the clocks of the nodes are not ours. And a gang that was not whole then was not,
    whichever pod begins to run in that moment.
    """
    reports, pods = observed.reports, observed.gang(job)
    symptoms = diagnose_pods(
        [*pods, *observed.stopping(job)],
        job,
        now,
        grace=settings.failure_grace,
        processes_per_node=observed.run.spec.parallelism.processes_per_node,
        seen=reports.seen,
    )
    if not symptoms:
        return None
    began = reports.failing_with
    late = not_started(pods) if began is None else [pod for pod in pods if pod.uid not in began]
    whole = [pod for pod in pods if pod not in late]
    silent = find_silent(symptoms, whole)
    grace = settings.node_grace if silent and not is_off(silent[0]) else settings.failure_grace
    ended = {pod.index for pod in pods if pod.has_ended} | job.failed_indexes | job.completed_indexes
    left = grace - (now - (reports.failing_since or now)).total_seconds()
    leaving = [pod for pod in whole if pod.deleting_at is not None and not pod.has_ended]
    if leaving and all(one.failure_class is FailureClass.PEER_LOST for one in symptoms):
        left = max(left, seconds_to_lost(leaving, now, settings.failure_grace, reports.seen) or 0.0)
    if job.failure or len(ended) >= observed.run.spec.parallelism.nodes:
        left = 0.0
    return Failing(symptoms, whole, late, silent, leaving, grace, left)

"""decide() for a gang from which a pod is taken away: what its peers fail by then is no fault of the run."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from lora_api import FailureClass, Phase
from lora_operator.diagnosis.firstseen import end_seen
from lora_operator.lifecycle.decide import decide
from lora_operator.state.observed import stop_seen
from lora_operator.state.reports import Reports
from lora_operator.watched.views import PodView
from tests.unit.operator.builders import NOW, a_run, ago, ended, running, said, seen
from tests.unit.operator.cases import JOB, SETTINGS, STARTED

STOP_SECONDS = 120
PREEMPTED, TAINTED = "PreemptionByScheduler", "DeletionByTaintManager"
EVICTED, LOST, NODE_LOST = FailureClass.EVICTED, FailureClass.POD_LOST, FailureClass.NODE_LOST


def asked(seconds: float, **more: Any) -> PodView:
    """Rank 0, which was asked to stop so many seconds ago, and still runs."""
    return running(0, node="n0", deleting_at=ago(seconds - STOP_SECONDS), stop_seconds=STOP_SECONDS, **more)


def lost(said_class: str = "PeerLost") -> PodView:
    return ended(1, 73, said(said_class), node="n1")


@dataclass(frozen=True)
class Case:
    """``stopped`` and ``failed``: seconds since rank 0 was seen to be asked to stop, and the first one to have ended.

    ``want`` is the class of the failure, none of which is charged; ``None``: the pods are waited for.
    """

    pods: tuple[PodView, ...]
    stopped: float
    failed: float
    want: FailureClass | None
    left: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "a pod that was asked to stop has its time for a checkpoint": Case((asked(95), lost()), 95, 95, None, 46.0),
    "however it is that it goes": Case((asked(95, disruption=PREEMPTED), lost()), 95, 95, None, 46.0),
    "then it is lost with its node": Case((asked(141), lost()), 141, 141, NODE_LOST),
    "of others that its peers say of their end it is the cause": Case(
        (asked(25, disruption=PREEMPTED), lost("Internal")), 25, 25, EVICTED
    ),
    "also where nobody says why it was asked to stop": Case((asked(25), lost("GPUUnavailable")), 25, 25, LOST),
    "and where its node does not answer": Case(
        (asked(25, disruption=TAINTED), lost("StoreUnavailable")), 25, 25, NODE_LOST
    ),
    "and what it says itself is by its end": Case(
        (ended(0, 70, said("Internal"), deleting_at=ago(-90), node="n0"), lost()), 30, 20, LOST
    ),
    "be it that a disk is full, as it was cleared": Case(
        (ended(0, 76, said("DiskFull"), deleting_at=ago(-90), node="n0"), lost()), 30, 20, LOST
    ),
    "or that it has saved its checkpoint and a peer broke": Case(
        (ended(0, 75, said("Checkpointed"), deleting_at=ago(-90), node="n0"), lost("Internal")), 30, 20, LOST
    ),
}


def observe(case: Case) -> Any:
    times = {stop_seen(case.pods[0]): ago(case.stopped)}
    times |= {end_seen(pod): ago(case.failed) for pod in case.pods if pod.has_ended}
    run = a_run(status=STARTED, runPolicy={"maxRestarts": 0})
    return seen(run, JOB, *case.pods, reports=Reports(failing_since=ago(case.failed), seen=times))


@pytest.mark.parametrize("name", CASES)
def test_a_gang_from_which_a_pod_is_taken(name: str) -> None:
    case = CASES[name]
    plan = decide(observe(case), NOW, SETTINGS)
    if case.want is None:
        assert plan.failed is None
        assert plan.requeue_after == case.left
        assert "for the end of pod tickets-1-0, asked to stop" in plan.message
        return
    assert plan.failed is not None
    assert plan.phase == Phase.RESTARTING
    assert (plan.failed.failure.failure_class, plan.failed.failure.pod) == (case.want, "tickets-1-0")
    assert not plan.failed.charged


@pytest.mark.parametrize(
    ("pods", "stopped", "want"),
    [
        ((asked(5), lost("Internal")), 5, "Internal"),
        ((asked(95), lost("BadData")), 95, "BadData"),
        ((asked(95), lost("GPUFault")), 95, "GPUFault"),
        ((ended(0, 70, said("Internal"), deleting_at=ago(-115), node="n0"), lost()), 5, "Internal"),
        ((ended(0, 66, said("BadData"), deleting_at=ago(-90), node="n0"), lost()), 30, "BadData"),
    ],
    ids=[
        "a pod that is asked to stop after another failed",
        "what comes again in the next attempt",
        "a GPU that is broken",
        "a pod that had failed before somebody deleted it",
        "data that is bad, whoever asks",
    ],
)
def test_what_is_the_runs_own_stays_so(pods: tuple[PodView, ...], stopped: float, want: str) -> None:
    plan = decide(observe(Case(pods, stopped, 25, None)), NOW, SETTINGS)
    assert plan.failed is not None
    assert plan.failed.failure.failure_class == want

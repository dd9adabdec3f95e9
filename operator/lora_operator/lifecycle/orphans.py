"""Pods whose Job is gone, and that nobody ends: somebody deleted it with --cascade=orphan. All pure.

They train on, and write checkpoints of the run. The operator may not delete pods, and whoever let them live may want
them to. So the next attempt waits for them, and the status names them; what they publish counts. But a run does not
wait for ever for pods of which nobody knows: after --start-timeout the next attempt begins beside them. Then both write
checkpoints. None is damaged unseen by that, as each file of a checkpoint has its digest in COMPLETE.json, but the GPUs
of one of the two are wasted, so that the status goes on naming them.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from lora_api import AdapterStatus, ConditionType, Phase
from lora_operator.diagnosis.diagnose import termination_of
from lora_operator.diagnosis.firstseen import ORPHANS
from lora_operator.settings import RunSettings
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Mark, Plan
from lora_operator.watched.views import PodView
from lora_operator.wording import with_remedy

REASON = "OrphanedPods"

_NAMED = 5
"""So many pods are named; a gang may have a thousand."""


def published_adapter(pods: Iterable[PodView]) -> AdapterStatus | None:
    """The adapter that rank 0 says it published. Once it is in the store, no other pod can take it back."""
    for pod in pods:
        if pod.index == 0 and pod.ended is not None and pod.ended.exit_code == 0 and not pod.ended.init_container:
            termination = termination_of(pod)
            if termination is not None and termination.outcome == "succeeded":
                return termination.adapter
    return None


def find_published(observed: Observed) -> tuple[int, AdapterStatus] | None:
    """The attempt whose orphans have published an adapter, and that adapter."""
    own = [pod for pod in observed.pods if pod.orphaned and pod.job_uid and pod.run_uid == observed.run.metadata.uid]
    for pod in own:
        adapter = published_adapter([pod])
        if adapter is not None and 0 < pod.attempt <= observed.run.status.attempt:
            return observed.run.status.attempt, adapter
    return None


def seconds_to_letting_go(observed: Observed, now: datetime, settings: RunSettings) -> float | None:
    """Seconds until orphans are not waited for any more; ``None`` where none are."""
    if not observed.orphans():
        return None
    waited = (now - observed.reports.seen.get(ORPHANS, now)).total_seconds()
    return settings.start_timeout - waited if waited < settings.start_timeout else None


def are_to_be_named(observed: Observed, now: datetime, settings: RunSettings) -> bool:
    """Whether orphans are so for sure. Those that still have an owner are about to be deleted, as a rule."""
    since = observed.reports.seen.get(ORPHANS, now)
    late = (now - since).total_seconds() >= settings.failure_grace
    return any(pod.orphaned or late for pod in observed.orphans())


def plan_orphans(observed: Observed, settings: RunSettings, left: float) -> Plan:
    """The next attempt waits for orphans, ``left`` seconds more at most."""
    message = with_remedy(
        f"{_describe(observed)}. The next attempt waits for them, for {settings.start_timeout:.0f} s at most",
        _remedy(observed),
    )
    attempt = observed.run.status.attempt
    return Plan(
        phase=Phase.RESTARTING if attempt else Phase.PENDING,
        reason=REASON,
        message=message,
        attempt=attempt,
        conditions={ConditionType.RUNNING: Mark(value=False, reason=REASON, message=message)},
        requeue_after=min(left, settings.failure_grace),
    )


def name_orphans(observed: Observed, plan: Plan) -> Plan:
    """``plan``, whose message also names the orphans beside which an attempt runs, or a run is suspended."""
    names = observed.orphans() and any(pod.orphaned for pod in observed.orphans())
    if not names or plan.phase is None or plan.ended or plan.failure is not None or plan.reason == REASON:
        return plan
    text = with_remedy(_describe(observed), _remedy(observed))
    return replace(plan, message=f"{plan.message.strip().rstrip('.')}. {text}")


def _describe(observed: Observed) -> str:
    pods = observed.orphans()
    names = ", ".join(pod.name for pod in pods[:_NAMED])
    more = f" and {len(pods) - _NAMED} more" if len(pods) > _NAMED else ""
    what = f"Pod {names} is" if len(pods) == 1 else f"Pods {names}{more} are"
    return f"{what} still there though their Job was deleted (orphaned), and may train on and write checkpoints"


def _remedy(observed: Observed) -> str:
    pods = " ".join(pod.name for pod in observed.orphans()[:_NAMED])
    return f"kubectl delete pod {pods}; or let them train to their end: what they publish counts."

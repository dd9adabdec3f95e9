"""What comes of a run: success, failure and whether another try follows, waiting, suspension. All pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from lora_api import AdapterStatus, ConditionType, Failure, FailureClass, LoRAFineTune, Phase
from lora_api.served import Score
from lora_operator.diagnosis.findings import Obstacle, Symptom
from lora_operator.policies.elsewhere import describe_next, describe_others, find_others, tries_elsewhere
from lora_operator.policies.memory import find_micro_batch, shrink_micro_batch
from lora_operator.policies.nodes import avoid
from lora_operator.policies.restarts import judge
from lora_operator.settings import RunSettings
from lora_operator.state.checkpoints import find_checkpoint
from lora_operator.state.failures import advise, new_failure
from lora_operator.state.observed import Observed
from lora_operator.state.plan import FailureRecord, Mark, Plan
from lora_operator.wording import with_remedy

PREFLIGHT = 0
"""The attempt that failures of a preflight belong to."""

CLEANUP_DELAY = 2.0
"""Seconds until what is on its way out is looked at again."""

_RETRY_SECONDS = 30.0
"""Until something that was refused is asked for again: no event tells when a quota or a policy changes."""


def decide_failure(
    observed: Observed,
    attempt: int,
    failure: Failure,
    now: datetime,
    settings: RunSettings,
    *,
    symptoms: Sequence[Symptom] = (),
    incomplete: bool = False,
    since: datetime | None = None,
    waiting_remedy: str = "",
    waited: timedelta = timedelta(0),
    forgets_nodes: bool = True,
) -> Plan:
    """Puts ``failure`` on record, and decides by its class whether another attempt (or preflight) follows.

    ``symptoms`` are all that was wrong with the pods, ``incomplete`` whether some of them had not started.
    ``since`` is when that which has become the failure began, and ``waiting_remedy`` what helped against it until then.
    ``waited`` is for how long the pods had waited for nodes. ``forgets_nodes``: where there was no room, the nodes
    that were avoided may be used again.
    """
    run, checkpoint = observed.run, find_checkpoint(observed, attempt)
    smaller = shrink_micro_batch(run, failure)
    others = find_others(run.status, failure, symptoms, checkpoint)
    elsewhere = tries_elsewhere(failure, others)
    verdict = judge(
        run, failure, now, base=settings.restart_backoff, checkpoint=checkpoint, shrinks=smaller is not None,
        elsewhere=elsewhere, repeated=bool(others), incomplete=incomplete, since=since,
        waiting_remedy=waiting_remedy, waited=waited,
    )  # fmt: skip
    failure = verdict.failure
    if verdict.retried and smaller is not None:
        failure = advise(failure, _shrunk(run, failure, smaller))
    elif verdict.retried and elsewhere:
        failure = advise(failure, describe_next(failure, ends=not verdict.waits))
    refusal = verdict.refusal or describe_others(failure, others)
    text = with_remedy(failure.message.strip().rstrip(".") + refusal, failure.remedy)
    reason = str(failure.failure_class)
    mark = Mark(value=False, reason=reason, message=text)
    kind, retry = ConditionType.RUNNING, Phase.RESTARTING
    if attempt == PREFLIGHT:
        kind, retry = ConditionType.PREFLIGHT_PASSED, Phase.PREFLIGHT
    forgets = failure.failure_class is FailureClass.NOT_PLACED and forgets_nodes
    record = FailureRecord(
        failure=failure,
        charged=verdict.charged,
        backoff=verdict.backoff,
        budget=verdict.budget,
        checkpoint=checkpoint,
        avoided=() if forgets else avoid(run.status, failure, symptoms, now),
        micro_batch_size=smaller if verdict.retried else None,
    )
    conditions = {kind: mark} if verdict.retried else {kind: mark, ConditionType.FAILED: replace(mark, value=True)}
    return Plan(
        phase=retry if verdict.retried else Phase.FAILED,
        reason=reason,
        message=text,
        attempt=attempt,
        conditions=conditions,
        failed=record,
        ended=not verdict.retried,
    )


def decide_lasting(observed: Observed, attempt: int, obstacle: Obstacle, now: datetime, settings: RunSettings) -> Plan:
    """Puts on record that ``obstacle`` has lasted too long."""
    return decide_failure(
        observed, attempt, obstacle.to_failure(attempt, now), now, settings,
        since=obstacle.since, waiting_remedy=obstacle.remedy,
    )  # fmt: skip


def _shrunk(run: LoRAFineTune, failure: Failure, smaller: int) -> str:
    """The remedy of a failure that the next attempt tries by itself."""
    return (
        f"The next attempt has micro-batches of {smaller} instead of {find_micro_batch(run, failure)} "
        "(runPolicy.onOutOfMemory: shrinkMicroBatch); globalBatchSize stays."
    )


def decide_success(attempt: int, adapter: AdapterStatus, disowned: Mapping[ConditionType, Mark] = {}) -> Plan:
    """The end that everybody wants. ``disowned`` is what there is to say where the adapter is not the run's."""
    message = f"Published {adapter.uri} as {adapter.served_name}{describe_scores(adapter)}"
    if disowned:
        message = f"The pods ended with success, but {disowned[ConditionType.PUBLISHED].message}"
    done = Mark(value=True, reason="Succeeded", message=message)
    return Plan(
        phase=Phase.SUCCEEDED,
        reason="Succeeded",
        message=message,
        attempt=attempt,
        conditions={
            ConditionType.SCHEDULED: scheduled_mark(value=True),
            ConditionType.RUNNING: Mark(value=False, reason="Succeeded", message="The run has ended"),
            ConditionType.PUBLISHED: done,
            ConditionType.COMPLETE: done,
            **disowned,
        },
        adapter=adapter,
        ended=True,
    )


def describe_scores(adapter: AdapterStatus) -> str:
    """How good ``adapter`` is, as the end of a sentence: on its base model as it is served first.

    Empty where the trainer said nothing of it: it had no evaluation records, or is of an earlier release.
    """
    served = adapter.served
    if served is None:
        return ""
    trained = Score(loss=adapter.eval_loss_after, share=adapter.eval_share_after)
    if not served.is_measured:
        why = served.problem or "its loss is missing"
        return f". On the base model that was trained on: {_show(trained)}; not measured as it is served: {why}"
    base = f". On the base model as it is served ({served.dtype}, {served.describe_records()}): {_show(served.after)}"
    return base if served.same_base else f"{base}; on the one that was trained on: {_show(served.training)}"


def _show(score: Score) -> str:
    share = "" if score.share is None else f", {score.share:.1%} right"
    return "no loss" if score.loss is None else f"loss {score.loss:.4f}{share}"


def decide_suspended(observed: Observed) -> Plan:
    """Nothing runs, and nothing is launched."""
    ending = bool(observed.leftovers())
    reason = "Suspending" if ending else "Suspended"
    message = (
        "Waiting for the pods to save a checkpoint and end" if ending else "Set runPolicy.suspend to false to go on"
    )
    return Plan(
        phase=Phase.SUSPENDED,
        reason=reason,
        message=message,
        attempt=observed.run.status.attempt,
        conditions={ConditionType.RUNNING: Mark(value=False, reason=reason, message=message)},
    )


def decide_wait(reason: str, message: str, requeue_after: float | None) -> Plan:
    """Nothing can be created yet. ``requeue_after`` None: an event will say when."""
    return Plan(phase=Phase.PENDING, reason=reason, message=message, requeue_after=requeue_after)


def decide_obstructed(
    observed: Observed, attempt: int, obstacle: Obstacle, now: datetime, settings: RunSettings
) -> Plan:
    """Something that ``attempt`` is made of is refused: it is tried again, until that has lasted too long."""
    left = obstacle.seconds_left(now, settings.start_timeout)
    if left is not None and left <= 0:
        return decide_lasting(observed, attempt, obstacle, now, settings)
    wait = decide_wait(obstacle.reason, obstacle.text, min(_RETRY_SECONDS, left or _RETRY_SECONDS))
    return replace(wait, attempt=observed.run.status.attempt)


def job_lost(attempt: int, now: datetime) -> Failure:
    """The failure of an attempt whose Job was deleted by somebody else."""
    message = f"The Job of attempt {attempt} was deleted from outside"
    return new_failure(FailureClass.POD_LOST, attempt, message, now, "JobDeleted")


def scheduled_mark(*, value: bool) -> Mark:
    """What the condition Scheduled says of a gang."""
    if value:
        return Mark(value=True, reason="PodsScheduled", message="Every pod has a node")
    return Mark(value=False, reason="PodsPending", message="Waiting for the pods")


def decide_conflict(
    observed: Observed, attempt: int, message: str, now: datetime, settings: RunSettings, *, passing: bool
) -> Plan:
    """A child's name is taken, as ``message`` says. ``passing``: by something that is about to go."""
    if passing:
        return decide_wait("WaitingForCleanup", f"{message} and is on its way out", CLEANUP_DELAY)
    failure = new_failure(FailureClass.NAME_CONFLICT, attempt, message, now)
    return decide_failure(observed, attempt, failure, now, settings)

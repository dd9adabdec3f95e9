"""After which failures another attempt follows, how soon, and for how long that goes on. All pure.

- Failures of the run itself are charged: runPolicy.maxRestarts of them may come between two complete checkpoints.
- What the cluster does to a run is not. It may go on for a day without a newer checkpoint (NoProgress).
- Nor is what may pass, such as a store that is away: the run waits for a day, or for an hour before its first success.
- Waiting for room is no failure at all, and has no end.

Each failure since the last newer checkpoint, of whichever class, doubles the pause before the next attempt.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from lora_api import RULES, Failure, FailureClass, LoRAFineTune, LoRAFineTuneStatus
from lora_operator.state.facts import has_passed
from lora_operator.state.failures import advise, new_failure
from lora_operator.state.plan import Budget
from lora_operator.wording import format_duration

MAX_BACKOFF = 600.0
"""Longest pause before a restart, in seconds."""

SAME_FAILURES = 3
"""So many failures of one class at one step are no accident."""

LONGEST = timedelta(days=1)
"""How long attempts that are not charged may fail without a newer checkpoint."""

LONGEST_AT_FIRST = timedelta(hours=1)
"""The same of what may pass, for a run of which nobody knows that it can work at all."""


@dataclass(frozen=True)
class Verdict:
    """What follows a failure, which may have become another one. ``refusal``: why no restart follows, if one would.

    ``waits``: what has failed is waited for, whichever node says so.
    """

    failure: Failure
    retried: bool
    charged: bool
    backoff: float
    budget: Budget
    refusal: str = ""
    waits: bool = False


def find_budget(status: LoRAFineTuneStatus, checkpoint: int | None) -> Budget:
    """What is used up, now that ``checkpoint`` is the step of the newest complete checkpoint that was told of."""
    if is_newer(status, checkpoint):
        return Budget()
    failures = max(
        status.recent_failures or 0, status.charged_restarts
    )  # an older operator has counted the latter alone
    return Budget(status.charged_restarts, failures, status.failing_since)


def is_newer(status: LoRAFineTuneStatus, checkpoint: int | None) -> bool:
    """Whether ``checkpoint`` is the step of a newer checkpoint than the one on record."""
    last = status.last_checkpoint
    return checkpoint is not None and (last is None or checkpoint > last.step)


def has_worked(status: LoRAFineTuneStatus, failure: Failure, checkpoint: int | None) -> bool:
    """Whether the run has had a first success: a preflight that passed, a step, a complete checkpoint."""
    told = bool(checkpoint or status.last_checkpoint or failure.step)
    return told or has_passed(status) or (status.progress is not None and status.progress.step > 0)


def judge(
    run: LoRAFineTune,
    failure: Failure,
    now: datetime,
    *,
    base: float,
    checkpoint: int | None = None,
    shrinks: bool = False,
    elsewhere: bool = False,
    repeated: bool = False,
    incomplete: bool = False,
    since: datetime | None = None,
    waiting_remedy: str = "",
    waited: timedelta = timedelta(0),
) -> Verdict:
    """What follows ``failure``.

    ``base`` is the first pause in seconds, ``checkpoint`` the step of the newest complete checkpoint that was told of.
    ``shrinks``: the next attempt has a smaller micro-batch. ``elsewhere``: it is to show what another node says.
    ``repeated``: other nodes have said the same, so that no further one is asked.
    ``incomplete``: some pods of the gang had not started, and nothing is charged to a gang that was not whole.
    ``since``: the failure is something that has lasted since then, and for which helps ``waiting_remedy`` while it is
    waited for, if not what helps for all of its class. ``waited``: so long what has failed had waited for its nodes,
    since the last failure: that is no time of failing.
    """
    status, rule = run.status, RULES[failure.failure_class]
    budget, worked = find_budget(status, checkpoint), has_worked(status, failure, checkpoint)
    if budget.since is not None:
        budget = replace(budget, since=min(now, budget.since + waited))
    waits = rule.outage and worked
    retried = (rule.retried and not repeated) or waits or shrinks or elsewhere
    charged = rule.charged and not incomplete
    if not retried:
        return Verdict(failure, retried=False, charged=False, backoff=0.0, budget=budget)
    begun, refusal = min(budget.since or now, since or now), ""
    waits_for_room = failure.failure_class is FailureClass.NOT_PLACED
    if charged:
        refusal = _refuse_charged(run, failure, budget)
    elif waits_for_room:
        pass
    elif now - begun >= (LONGEST_AT_FIRST if rule.outage and not worked else LONGEST):
        lasted = format_duration(round((now - begun).total_seconds()))
        refusal = f" (for {lasted}, in {budget.count + 1} attempts)"
        failure = failure if rule.outage else _no_progress(failure, now)
    elif waits and (remedy := waiting_remedy or rule.waiting_remedy):
        failure = advise(failure, remedy)
    if refusal:
        return Verdict(failure, retried=False, charged=False, backoff=0.0, budget=budget, refusal=refusal)
    after = Budget(budget.charged + charged, budget.count + 1, budget.since if waits_for_room else begun)
    backoff = compute_backoff(budget.count, base)
    if waits_for_room:
        backoff *= spread(run.metadata.uid, failure.attempt)
    return Verdict(failure, retried=True, charged=charged, backoff=backoff, budget=after, waits=waits)


def _refuse_charged(run: LoRAFineTune, failure: Failure, budget: Budget) -> str:
    limit = run.spec.run_policy.max_restarts
    if budget.charged >= limit:
        return f" (after {budget.charged} of runPolicy.maxRestarts = {limit} restarts)"
    if is_repetition(since_retry(run.status), failure):
        return f" (the {SAME_FAILURES}rd time in a row at step {failure.step}, so it is no accident)"
    return ""


def _no_progress(failure: Failure, now: datetime) -> Failure:
    """What a run ends with whose attempts come to nothing. What may pass keeps its class: that says best what to do."""
    message = f"No newer checkpoint is complete; the last attempt ended as {failure.failure_class}: {failure.message}"
    kept = {name: getattr(failure, name) for name in ("pod", "node", "rank", "step", "exit_code", "at")}
    return new_failure(FailureClass.NO_PROGRESS, failure.attempt, message, now).model_copy(update=kept)


def spread(uid: str, attempt: int) -> float:
    """A share of a pause between a half and all of it, another one for each run and attempt.

    Two gangs that hold what the other one needs give it back at the same moment. Without this they would also begin
    again at the same moment, time after time.
    """
    digest = hashlib.sha256(f"{uid}/{attempt}".encode()).digest()
    return 1.0 - int.from_bytes(digest[:4]) / 2**33


def compute_backoff(failures: int, base: float) -> float:
    """Seconds before the next attempt, after ``failures`` before this one."""
    return float(min(MAX_BACKOFF, base * 2.0 ** min(failures, 30)))


def since_retry(status: LoRAFineTuneStatus) -> list[Failure]:
    """The failures since runPolicy.retry was raised: what was before it counts for nothing."""
    last = (status.retried_attempts or 0) - status.failed_preflights
    return [failure for failure in status.failures if failure.attempt > last or not failure.attempt]


def is_repetition(earlier: Sequence[Failure], failure: Failure) -> bool:
    """Whether the last attempts all ended with the class of ``failure``, at the same step, so that it is no accident.

    Only of classes that are charged: a node may be taken away at the same step as often as it likes.
    """
    if failure.step is None or not RULES[failure.failure_class].charged:
        return False
    last = [*earlier, failure][-SAME_FAILURES:]
    same = {(one.failure_class, one.step) for one in last}
    return len(last) == SAME_FAILURES and len(same) == 1

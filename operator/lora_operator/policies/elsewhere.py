"""Whether another node may do what one could not, where the class of the failure alone would end the run. All pure.

A driver that is too old, a limit that is too low, a disk or a memory that is full or a container that does not start
may be the fault of one node, or of the run. One more attempt tells, which avoids that node: what a second node says too
is the run's own.
"""

from collections.abc import Iterable, Sequence

from lora_api import RULES, Failure, FailureClass, LoRAFineTuneStatus
from lora_operator.diagnosis.findings import Symptom
from lora_operator.diagnosis.reasons import DISK_LIMIT, NODE_FULL, is_unstarted
from lora_operator.policies.restarts import SAME_FAILURES, find_budget, since_retry


def may_differ(failure_class: FailureClass, reason: str) -> bool:
    """Whether such a failure is to end a run, though another node may not have it."""
    by_class = RULES[failure_class].elsewhere and reason != DISK_LIMIT
    full = failure_class is FailureClass.EVICTED and reason == NODE_FULL
    return by_class or full or is_unstarted(failure_class, reason)


def tries_elsewhere(failure: Failure, others: Sequence[str]) -> bool:
    """Whether the next attempt is to show what another node says. ``others`` have said the same already."""
    return bool(failure.node) and may_differ(failure.failure_class, failure.reason) and not others


def find_others(
    status: LoRAFineTuneStatus, failure: Failure, symptoms: Iterable[Symptom], checkpoint: int | None
) -> list[str]:
    """The nodes that have said what ``failure`` says, in this attempt or since the last complete checkpoint.

    The node of ``failure`` itself is one of them where it says so for the third time: it was avoided, and no other has
    taken the pods. A preflight and a gang need different things, so that neither speaks for the other.
    """
    if not (failure.node and may_differ(failure.failure_class, failure.reason)):
        return []
    now = {
        one.pod.node
        for one in symptoms
        if one.pod and one.failure_class is failure.failure_class and may_differ(one.failure_class, one.reason)
    }
    last = status.last_checkpoint
    earlier = since_retry(status) if find_budget(status, checkpoint).count else []
    before = [
        one.node
        for one in earlier
        if one.failure_class is failure.failure_class
        and may_differ(one.failure_class, one.reason)
        and bool(one.attempt) == bool(failure.attempt)
        and (last is None or one.at > last.at)
    ]
    others = (now | set(before)) - {failure.node}
    if before.count(failure.node) >= SAME_FAILURES - 1:
        others.add(failure.node)
    return sorted(node for node in others if node)


def describe_others(failure: Failure, nodes: Sequence[str]) -> str:
    """That ``nodes`` have said the same, as the end of a sentence; empty where none has."""
    others = [node for node in nodes if node != failure.node]
    if others:
        return f" (node {', '.join(others)} said so too)"
    return f" (the {SAME_FAILURES}rd time, and no other node took the pod)" if nodes else ""


def describe_next(failure: Failure, *, ends: bool) -> str:
    """What to do about a failure that is tried again elsewhere. ``ends``: what a second node says ends the run."""
    avoids = f"The next attempt avoids node {failure.node}."
    if not failure.attempt:
        avoids = f"The next preflight avoids node {failure.node} where another one takes it."
    return f"{avoids} If another node says the same{', the run ends' if ends else ''}: {failure.remedy}"

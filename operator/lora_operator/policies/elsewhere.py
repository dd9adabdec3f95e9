"""Whether another node may do what one could not, where the class of the failure alone would end the run. All pure.

A driver that is too old, a limit that is too low or a container that does not start may be the fault of one node, or of
the run. One more attempt tells, which avoids that node: what a second node says too is the run's own.
"""

from collections.abc import Iterable, Sequence

from lora_api import RULES, Failure, FailureClass, LoRAFineTuneStatus
from lora_operator.diagnosis.diagnose import Symptom
from lora_operator.diagnosis.reasons import is_unstarted
from lora_operator.policies.restarts import find_budget, since_retry


def may_differ(failure_class: FailureClass, reason: str) -> bool:
    """Whether such a failure ends a run, though another node may not have it."""
    return RULES[failure_class].elsewhere or is_unstarted(failure_class, reason)


def tries_elsewhere(failure: Failure, others: Sequence[str]) -> bool:
    """Whether the next attempt is to show what another node says. ``others`` have said the same already."""
    return bool(failure.node) and may_differ(failure.failure_class, failure.reason) and not others


def find_others(
    status: LoRAFineTuneStatus, failure: Failure, symptoms: Iterable[Symptom], checkpoint: int | None
) -> list[str]:
    """The nodes that have said what ``failure`` says, in this attempt or since the last complete checkpoint.

    The node of ``failure`` itself is one of them where it said so before: it was avoided, and there is no other.
    """
    if not (failure.node and may_differ(failure.failure_class, failure.reason)):
        return []
    now = {one.pod.node for one in symptoms if one.pod and one.failure_class is failure.failure_class}
    last = status.last_checkpoint
    earlier = since_retry(status) if find_budget(status, checkpoint).count else []
    before = {
        one.node
        for one in earlier
        if one.failure_class is failure.failure_class
        and may_differ(one.failure_class, one.reason)
        and (last is None or one.at > last.at)
    }
    return sorted(node for node in (now - {failure.node}) | before if node)


def describe_others(nodes: Sequence[str]) -> str:
    """That other nodes have said the same, as the end of a sentence; empty where none has."""
    return f" (node {', '.join(nodes)} said so too)" if nodes else ""


def describe_next(failure: Failure) -> str:
    """What to do about a failure that is tried again elsewhere."""
    return f"The next attempt avoids node {failure.node}. If another node says the same, the run ends: {failure.remedy}"

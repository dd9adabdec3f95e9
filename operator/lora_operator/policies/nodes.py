"""Which nodes the next attempts avoid. All pure.

A node that refuses pods or loses them, or whose GPU failed, is on record for a day, and no pod of the run goes there.
It is only put off: where nothing else has room, the run takes it again rather than wait for ever.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from lora_api import RULES, Failure, FailureClass, LoRAFineTune, LoRAFineTuneStatus
from lora_api.status import MAX_AVOIDED_NODES, AvoidedNode
from lora_operator.diagnosis.findings import Symptom
from lora_operator.diagnosis.reasons import (
    DISK_LIMIT,
    LOST_BY_NODE,
    NODE_FULL,
    NOT_READIED,
    is_refusal,
    is_unstarted,
    was_refused,
)

AVOIDED_FOR = timedelta(days=1)


def avoid(
    status: LoRAFineTuneStatus, failure: Failure, symptoms: Iterable[Symptom], now: datetime
) -> tuple[AvoidedNode, ...]:
    """The nodes to avoid after ``failure``, whose attempt ended with ``symptoms``: the newest last."""
    bad = [(failure.node, failure.failure_class)] if speaks_of_node(failure.failure_class, failure.reason) else []
    bad += [
        (one.pod.node, one.failure_class)
        for one in symptoms
        if one.pod and (speaks_of_node(one.failure_class, one.reason) or was_refused(one.pod))
    ]
    nodes = {node.name: node for node in keep_recent(status.avoided_nodes or [], now)}
    for name, failure_class in bad:
        if name:
            nodes.pop(name, None)  # so that it counts as the newest
            nodes[name] = AvoidedNode(name=name, reason=str(failure_class), since=now)
    return tuple(nodes.values())[-MAX_AVOIDED_NODES:]


def keep_recent(nodes: Iterable[AvoidedNode], now: datetime) -> list[AvoidedNode]:
    """Those of ``nodes`` that are still to be avoided."""
    return [node for node in nodes if now - node.since < AVOIDED_FOR]


def forget_old(run: LoRAFineTune, now: datetime) -> LoRAFineTune:
    """``run`` without the nodes that are not to be avoided any more: it may have been suspended for days."""
    nodes = run.status.avoided_nodes or []
    kept = keep_recent(nodes, now)
    if len(kept) == len(nodes):
        return run
    return run.model_copy(update={"status": run.status.model_copy(update={"avoided_nodes": kept or None})})


def speaks_of_node(failure_class: FailureClass, reason: str) -> bool:
    """Whether a failure is one of the node of its pod, so that another node may do what this one did not."""
    lost = failure_class is FailureClass.POD_LOST
    refused = lost and (is_refusal(reason) or reason in LOST_BY_NODE | NOT_READIED)
    full = failure_class is FailureClass.EVICTED and reason == NODE_FULL
    by_class = RULES[failure_class].node and reason != DISK_LIMIT
    return by_class or refused or full or is_unstarted(failure_class, reason)


def describe_forgotten(nodes: Sequence[AvoidedNode]) -> str:
    """That the nodes are no longer avoided, as the end of a sentence; empty where none was."""
    names = ", ".join(node.name for node in nodes)
    return f"; the nodes that were avoided may be used again: {names}" if names else ""

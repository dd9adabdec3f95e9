"""What Kueue says of a Job that waits: its Workload. All pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_operator.settings import RunSettings

_DEACTIVATED = "Deactivated"


@dataclass(frozen=True)
class QueueReport:
    """What Kueue says of a suspended Job.

    ``installed`` False: the cluster does not know Kueue. ``workload`` empty: Kueue has no Workload for the Job.
    ``position`` counts from 1 in the ClusterQueue, over all namespaces. ``evicted`` is why the quota was taken back.
    """

    installed: bool = True
    workload: str = ""
    queue: str = ""
    reserved: bool = False
    reason: str = ""
    message: str = ""
    evicted: str = ""
    evicted_message: str = ""
    position: int | None = None

    @property
    def pending(self) -> bool:
        """The Workload waits for quota, so that it has a place in a queue."""
        return bool(self.queue) and not self.reserved and not self.deactivated

    @property
    def deactivated(self) -> bool:
        """The Workload was switched off: it is not queued again until somebody switches it on."""
        return self.evicted.startswith(_DEACTIVATED)


def parse_workload(raw: Mapping[str, Any]) -> QueueReport:
    """What a Workload of Kueue says: why it waits, in the words of the condition that is not fulfilled."""
    conditions = {item["type"]: item for item in (raw.get("status") or {}).get("conditions") or ()}
    reserved, admitted = conditions.get("QuotaReserved", {}), conditions.get("Admitted", {})
    evicted = conditions.get("Evicted", {})
    has_quota = reserved.get("status") == "True"
    waits = admitted if has_quota else reserved
    was_evicted = evicted.get("status") == "True"
    return QueueReport(
        workload=raw["metadata"]["name"],
        queue=(raw.get("spec") or {}).get("queueName") or "",
        reserved=has_quota,
        reason=waits.get("reason", ""),
        message=waits.get("message", ""),
        evicted=evicted.get("reason", "") if was_evicted else "",
        evicted_message=evicted.get("message", "") if was_evicted else "",
    )


def find_position(pending: Iterable[Mapping[str, Any]], workload: str) -> int | None:
    """The number of ``workload`` in its ClusterQueue, counted from 1, in the list of Kueue's visibility API."""
    for item in pending:
        if item["metadata"]["name"] == workload:
            return int(item.get("positionInClusterQueue") or 0) + 1
    return None


def uses_kueue(queue_name: str | None, settings: RunSettings) -> bool:
    """Whether ``queue_name`` is one of Kueue. Volcano has queues of its own, and holds back pods rather than Jobs."""
    return queue_name is not None and settings.gang_scheduler != "volcano"

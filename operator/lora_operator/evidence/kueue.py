"""What Kueue says of a run that waits: its Workload, and the number of that in its queue. IO only."""

import logging
from dataclasses import replace

from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError, NotFoundError
from lora_operator.objects import Raw
from lora_operator.state.workload import QueueReport, find_position, parse_workload
from lora_operator.watched.views import JobView

logger = logging.getLogger(__name__)

VERSIONS = ("v1beta2", "v1beta1")
"""Of Kueue's APIs, the newest first. What is read here is the same in both."""


async def fetch_queue_report(kube: KubeClient, job: JobView) -> QueueReport:
    """What Kueue says of ``job``.

    Raises:
        KubeError: it did not answer, or may not be asked.
    """
    try:
        workload = await _fetch_workload(kube, job)
    except NotFoundError:
        return QueueReport(installed=False)
    if workload is None:
        return QueueReport()
    report = parse_workload(workload)
    if not report.pending:
        return report
    pending = await _fetch_pending(kube, job.namespace, report.queue)
    return replace(report, position=find_position(pending, report.workload))


async def _fetch_workload(kube: KubeClient, job: JobView) -> Raw | None:
    """The Workload of ``job``, or ``None`` where Kueue has made none.

    Raises:
        NotFoundError: the cluster does not know Kueue.
    """
    missing = NotFoundError(404, "no version of Kueue's API")
    for version in VERSIONS:
        found = kube.fetch_list(f"workloads.{version}", job.namespace, f"kueue.x-k8s.io/job-uid={job.uid}")
        try:
            return await anext(found, None)
        except NotFoundError as error:
            missing = error
        finally:
            await found.aclose()
    raise missing


async def _fetch_pending(kube: KubeClient, namespace: str, queue: str) -> list[Raw]:
    """The Workloads that wait in a LocalQueue; none where Kueue does not tell (its visibility API)."""
    for version in VERSIONS:
        try:
            found = await kube.fetch_object(f"localqueues.{version}", namespace, queue, "pendingworkloads")
        except KubeError as error:
            logger.debug("%s/%s: the list of the queue is not shown: %s", namespace, queue, error)
            continue
        return list(found.get("items") or ())
    return []

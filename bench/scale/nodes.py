"""What the Job controller, the scheduler and the kubelets would do, played: pods come, run and succeed.

There are no nodes. Jobs wait until ``take`` lets pods be made for them, and pods wait until ``start`` lets them run.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from bench.scale.client import JOBS, PODS, Client, Raw, RefusedError
from lora_operator.names import CONTROLLER_LABEL, INDEX_LABEL, JOB_NAME_LABEL, RUN_LABEL
from tests.support.runs import adapter_of, ended, now, running, termination, unschedulable

WAITING = "0/8 nodes are available: 8 Insufficient nvidia.com/gpu."
_ALL_JOBS = "/apis/batch/v1/jobs"
_AT_ONCE = 8


def build_pod(job: Raw, index: int, node: str = "") -> Raw:
    """The pod that the Job controller makes for an index, on ``node`` where one is named."""
    metadata, template = job["metadata"], job["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
    own = {INDEX_LABEL: str(index), JOB_NAME_LABEL: metadata["name"], CONTROLLER_LABEL: metadata["uid"]}
    labels = {**template["metadata"]["labels"], **own}
    return {
        "metadata": {
            "generateName": f"{metadata['name']}-{index}-",
            "name": f"{metadata['name']}-{index}-abcde",
            "namespace": metadata["namespace"],
            "labels": labels,
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {**template["spec"], **({"nodeName": node} if node else {})},
    }


def build_pod_status(index: int, phase: str, job: Raw) -> Raw:
    """Status of a pod that waits for a node, runs, or has succeeded. Rank 0 tells of the adapter."""
    if phase == "Pending":
        return unschedulable(WAITING)
    metadata = job["metadata"]
    adapter = adapter_of(metadata["namespace"], metadata["labels"][RUN_LABEL])
    return running() if phase == "Running" else ended(0, "" if index else termination(adapter=adapter), "Completed")


def build_job_status(job: Raw, phase: str) -> Raw:
    """Status of a Job whose pods are all in ``phase``."""
    nodes, start = size(job), {"startTime": job["metadata"]["creationTimestamp"]}
    if phase != "Succeeded":
        return {**start, "active": nodes, "ready": nodes if phase == "Running" else 0}
    conditions = [
        {"type": kind, "status": "True", "lastProbeTime": now(), "lastTransitionTime": now()}
        for kind in ("SuccessCriteriaMet", "Complete")
    ]
    indexes = ",".join(str(index) for index in range(nodes))
    return {
        **start, "active": 0, "ready": 0, "terminating": 0, "succeeded": nodes, "completedIndexes": indexes,
        "completionTime": now(), "conditions": conditions, "uncountedTerminatedPods": {},
    }  # fmt: skip


class Nodes:
    """Plays all Jobs that are new."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._take, self._start = asyncio.Event(), asyncio.Event()
        self.errors: list[BaseException] = []

    def hold(self) -> None:
        """No pods are made."""
        self._take.clear()
        self._start.clear()

    def forget(self) -> None:
        """Jobs so far stay as they are. No pods are made."""
        self.hold()
        for task in self._tasks:
            task.cancel()

    def take(self) -> None:
        """Pods are made, and wait for a node."""
        self._take.set()

    def start(self) -> None:
        """Pods are made, run, and succeed."""
        self._take.set()
        self._start.set()

    async def follow(self) -> None:
        """Plays every Job that is made from now on."""
        version = await self._client.newest(_ALL_JOBS)
        async for kind, job in self._client.watch(_ALL_JOBS, RUN_LABEL, version):
            if kind == "ADDED" and not job["status"]:
                task = asyncio.create_task(self._play(job))
                self._tasks.add(task)
                task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        gone = isinstance(error, RefusedError) and error.status == 404
        if error is not None and not gone:
            self.errors.append(error)

    async def _play(self, job: Raw) -> None:
        await self._take.wait()
        async with self._places:
            await make_pods(self._client, job)
            await set_phase(self._client, job, "Pending")
        await self._start.wait()
        async with self._places:
            await set_phase(self._client, job, "Running")
        async with self._places:
            await set_phase(self._client, job, "Succeeded")


def size(job: Raw) -> int:
    """Pods of a Job."""
    return int(job["spec"]["completions"])


async def make_pods(client: Client, job: Raw, node_of: Callable[[int], str] = lambda _: "") -> None:
    """Makes the pods of a Job, on the nodes that ``node_of`` names."""
    path = PODS.format(job["metadata"]["namespace"])
    for index in range(size(job)):
        await client.call("POST", path, build_pod(job, index, node_of(index)))


async def set_phase(client: Client, job: Raw, phase: str) -> None:
    """Brings the pods of a Job, and then the Job, to ``phase``."""
    metadata = job["metadata"]
    for index in range(size(job)):
        name = build_pod(job, index)["metadata"]["name"]
        await client.set_status(f"{PODS.format(metadata['namespace'])}/{name}", build_pod_status(index, phase, job))
    path = f"{JOBS.format(metadata['namespace'])}/{metadata['name']}"
    await client.set_status(path, build_job_status(job, phase))


@asynccontextmanager
async def play_nodes(client: Client) -> AsyncIterator[Nodes]:
    """Nodes that play for the length of the block."""
    nodes = Nodes(client)
    task = asyncio.create_task(nodes.follow())
    try:
        yield nodes
    finally:
        nodes.forget()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

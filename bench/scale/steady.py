"""Gangs that run while new ones come: first all is well, then a rack dies and kubelets hang.

There are no controllers. Nodes and gangs are copies of one that the operator itself has brought to where it is, the
bench plays what the node controller does, and the API server asks played kubelets for logs, as it asks real ones.
"""

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bench.scale.audit import Call, by_operator, count_calls
from bench.scale.bench import TINY, Bench, make_bench, quantile
from bench.scale.client import JOBS, PODS, RUNS, Client, EtcdClient, Raw, run_all
from bench.scale.gangs import (
    UNTOLD_SECONDS,
    SteadySize,
    build_gang,
    build_log,
    build_running_progress,
    compute_lags,
    compute_rates,
    gang_name,
    node_name,
    seat_name,
    summarize_latencies,
)
from bench.scale.kubelets import ADDRESS, run_dead_kubelets, run_hung_kubelets, run_kubelets
from bench.scale.nodes import make_pods, set_phase
from bench.scale.parts import latencies
from bench.scale.process import OperatorProcess
from bench.scale.profile import read_samples, summarize
from bench.scale.residents import Template, fetch_template, write_all
from devcluster import ControlPlane
from tests.support.runs import now

Numbers = dict[str, Any]

_NEW = "new"
"""Namespace of the runs that come meanwhile."""

_ALL_RUNS = "/apis/lorafinetune.io/v1alpha1/lorafinetunes"
_NODES = "/api/v1/nodes"
_NAMESPACES = 10
_AT_ONCE = 16
_AGE = timedelta(seconds=1000)
"""How long the gangs have run already."""


@dataclass(frozen=True)
class _Ports:
    """Where kubelets answer, where they hang, and where there is none."""

    well: int
    hung: int
    dead: int


async def measure_steady(plane: ControlPlane, size: SteadySize, say: Callable[[str], None]) -> Numbers:
    """Both windows. Returns what is written to operator.json."""
    begin = datetime.now(UTC) - _AGE
    async with (
        make_bench(plane, replace(TINY, namespaces=_NAMESPACES)) as bench,
        _run_all_kubelets(plane, begin) as ports,
    ):
        cluster = _Cluster(bench, size, ports, begin)
        await cluster.prepare()
        await cluster.populate()
        samples = plane.directory / "samples"
        with bench.operator(flags=size.flags, samples=samples) as operator:
            seconds = await operator.settle(size.gangs, while_due=True)
            say(f"{size.gangs} gangs of {size.pods} are seen after {seconds:.1f} s")
            await asyncio.sleep(size.warm_seconds)
            await operator.end_part()
            calm = await cluster.measure(operator)
            await operator.end_part()
            say(f"steady, all well: {calm}")
            async with asyncio.TaskGroup() as group:
                trouble = group.create_task(cluster.break_down())
                ill = await cluster.measure(operator)
                await trouble
            say(f"steady, in trouble: {ill}")
            told, disturbed = await cluster.look_at_gangs()
    return {
        "gangs": size.gangs,
        "pods": size.pods,
        "nodes": size.layout.nodes,
        "rack": size.rack,
        "hung": size.hung,
        "deadGangs": len(size.layout.dead_gangs),
        "silentGangs": len(size.layout.silent_gangs),
        "secondsUntilAllSeen": round(seconds, 1),
        "profile": summarize(read_samples(samples / "1.json")),
        "well": calm,
        "trouble": ill,
        "deadGangsTold": told,
        "disturbed": disturbed,
    }


@asynccontextmanager
async def _run_all_kubelets(plane: ControlPlane, begin: datetime) -> AsyncIterator[_Ports]:
    @functools.lru_cache(maxsize=1)
    def render(second: int) -> str:
        return build_log(begin, begin + timedelta(seconds=second))

    def read_log(namespace: str, pod: str) -> str | None:
        return render(int((datetime.now(UTC) - begin).total_seconds()))

    authority = plane.files.authority
    async with AsyncExitStack() as stack:
        well = await stack.enter_async_context(run_kubelets(authority, read_log))
        hung = await stack.enter_async_context(run_hung_kubelets(authority))
        yield _Ports(well, hung, stack.enter_context(run_dead_kubelets()))


class _Cluster:
    """Nodes and gangs of ``size``, whose kubelets are at ``ports``. The gangs have run since ``begin``."""

    def __init__(self, bench: Bench, size: SteadySize, ports: _Ports, begin: datetime) -> None:
        self._bench = bench
        self._client: Client = bench.client
        self._size = size
        self._layout = size.layout
        self._ports = ports
        self._begin = begin
        self._told = frozenset(
            gang_name(gang)
            for gang in range(size.gangs)
            if gang not in self._layout.dead_gangs | self._layout.silent_gangs
        )
        """Runs that nothing happens to."""

    async def prepare(self) -> None:
        """Makes the nodes, and the namespace of the runs that come meanwhile."""
        await self._client.call("POST", "/api/v1/namespaces", {"metadata": {"name": _NEW}})
        names = [node_name(node) for node in range(self._layout.nodes)]
        names += [seat_name(rank) for rank in range(self._size.pods)]
        await run_all(names, self._make_node, _AT_ONCE)

    async def _make_node(self, name: str) -> None:
        await self._client.call("POST", _NODES, {"metadata": {"name": name}})
        await self._set_node(name, self._ports.well, "True")

    async def _set_node(self, name: str, port: int, ready: str) -> None:
        times = dict.fromkeys(("lastHeartbeatTime", "lastTransitionTime"), now())
        reason = "KubeletReady" if ready == "True" else "NodeStatusUnknown"
        status = {
            "conditions": [{"type": "Ready", "status": ready, "reason": reason, "message": "", **times}],
            "addresses": [{"type": "InternalIP", "address": ADDRESS}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        await self._client.set_status(f"{_NODES}/{name}", status)

    async def populate(self) -> None:
        """Makes the gangs, which all run."""
        template = await self._make_template()
        places = self._bench.namespaces
        writes = (
            write
            for gang in range(self._size.gangs)
            for write in template.copies(
                gang_name(gang),
                places[gang % len(places)],
                {seat_name(rank): node_name(self._layout.node(gang, rank)) for rank in range(self._size.pods)},
            )
        )
        async with EtcdClient(self._bench.plane) as etcd:
            await write_all(etcd, writes)
        await self._bench.wait_for_api_server()

    async def _make_template(self) -> Template:
        """A gang that the operator has launched and seen run; it is gone when this returns."""
        namespace, name = self._bench.namespaces[0], "template-run"
        with self._bench.operator(flags=self._size.flags) as operator:
            await operator.settle(0)
            await self._client.call("POST", RUNS.format(namespace), build_gang(name, self._size.pods))
            await self._bench.wait_for_status(name, "a gang that starts", lambda status: status.get("attempt") == 1)
            job = await self._client.call("GET", f"{JOBS.format(namespace)}/{name}-1")
            await make_pods(self._client, job, seat_name)
            await set_phase(self._client, job, "Running")
            await self._bench.wait_for_status(name, "a gang that runs", lambda status: status.get("progress"))
            await operator.rest()
        template = await fetch_template(self._client, namespace, name)
        run = next(item for item in template.objects if item["kind"] == "LoRAFineTune")
        run["status"]["progress"] = build_running_progress(
            self._begin, datetime.now(UTC) - timedelta(seconds=UNTOLD_SECONDS)
        )
        await self._bench.clear(namespace)
        return template

    async def measure(self, operator: OperatorProcess) -> Numbers:
        """One window: new runs come, and all else goes on."""
        size, lags = self._size, list[float]()
        mark, before, begin = self._bench.audit.mark(), operator.usage(), time.monotonic()
        creating = asyncio.create_task(
            self._bench.create(round(size.rate * size.seconds), size.rate, namespaces=[_NEW])
        )
        try:
            for share in (0.5, 1.0):
                await asyncio.sleep(max(0.0, begin + share * size.seconds - time.monotonic()))
                lags += await self._sample_lags()
            names = await creating
        finally:
            creating.cancel()
        after, seconds = operator.usage(), time.monotonic() - begin
        window = by_operator(self._bench.audit.since(mark))
        await self._bench.wait_calls(mark, "launched meanwhile", names, is_stored)
        calls = self._bench.audit.since(mark)
        return {
            "seconds": round(seconds, 1),
            "newRuns": len(names),
            **summarize_latencies(latencies(calls, names)),
            "operatorCores": round((after.cpu - before.cpu) / seconds, 3),
            "rssMiB": round(after.rss, 1),
            "peakMiB": round(after.peak, 1),
            "callsPerSecond": compute_rates(count_calls(window), seconds),
            "statusWritesPerSecond": round(sum(_is_status(call) for call in window) / seconds, 2),
            "logsUnread": sum(call.resource == "pods/log" and call.code != 200 for call in window),
            "lagSeconds": {"p50": quantile(lags, 0.5), "p99": quantile(lags, 0.99), "max": max(lags)},
            "load": round(os.getloadavg()[0], 1),
        }

    async def _sample_lags(self) -> list[float]:
        runs = (await self._client.call("GET", f"{_ALL_RUNS}?resourceVersion=0"))["items"]
        return compute_lags(runs, self._told, self._begin, datetime.now(UTC))

    async def break_down(self) -> None:
        """Kubelets hang and a rack dies; Kubernetes notices after a while, and in the end gives its pods up."""
        layout, pause = self._layout, self._size.seconds / 4
        dead = [node_name(node) for node in range(layout.nodes) if layout.is_dead(node)]
        hung = [node_name(node) for node in range(layout.nodes) if layout.is_hung(node)]
        await run_all(hung, lambda name: self._set_node(name, self._ports.hung, "True"), _AT_ONCE)
        await run_all(dead, lambda name: self._set_node(name, self._ports.dead, "True"), _AT_ONCE)
        await asyncio.sleep(pause)
        await run_all(dead, lambda name: self._set_node(name, self._ports.dead, "Unknown"), _AT_ONCE)
        pods = [pod for node in dead for pod in await self._fetch_pods(node)]
        await run_all(pods, self._set_unready, _AT_ONCE)
        await asyncio.sleep(pause)
        await run_all(pods, self._evict, _AT_ONCE)
        await asyncio.sleep(pause)
        await run_all(pods, self._remove, _AT_ONCE)

    async def _fetch_pods(self, node: str) -> list[str]:
        found = await self._client.call("GET", f"/api/v1/pods?fieldSelector=spec.nodeName={node}")
        return [f"{PODS.format(pod['metadata']['namespace'])}/{pod['metadata']['name']}" for pod in found["items"]]

    async def _set_unready(self, pod: str) -> None:
        """What the node controller does first."""
        await self._add_condition(pod, {"type": "Ready", "status": "False", "reason": "NodeNotReady"})

    async def _evict(self, pod: str) -> None:
        """What it does five minutes later. Nobody ends the pod, whose kubelet is dead."""
        taken = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "no word"}
        await self._add_condition(pod, taken)
        await self._client.call("DELETE", pod, {"gracePeriodSeconds": 1})

    async def _remove(self, pod: str) -> None:
        """What the pod garbage collector does once somebody says that the node is out of service."""
        await self._client.set_status(pod, {"phase": "Failed"})
        await self._client.call("DELETE", pod, {"gracePeriodSeconds": 0})

    async def _add_condition(self, pod: str, condition: Raw) -> None:
        old = (await self._client.call("GET", pod))["status"]["conditions"]
        kept = [item for item in old if item["type"] != condition["type"]]
        await self._client.set_status(pod, {"conditions": [*kept, {**condition, "lastTransitionTime": now()}]})

    async def look_at_gangs(self) -> tuple[int, int]:
        """How many gangs on the rack have a failure on record, and how many others do not run as they did."""
        dead = {gang_name(gang) for gang in self._layout.dead_gangs}
        gangs = {gang_name(gang) for gang in range(self._size.gangs)}
        runs = (await self._client.call("GET", _ALL_RUNS))["items"]
        status = {run["metadata"]["name"]: run.get("status", {}) for run in runs}  # a new run has none yet
        told = sum(bool(status.get(name, {}).get("failures")) for name in dead)
        well = [name for name in gangs - dead if _runs_on(status.get(name, {}))]
        return told, len(gangs - dead) - len(well)


def _runs_on(status: Raw) -> bool:
    return status.get("phase") == "Running" and status.get("attempt") == 1


def is_stored(call: Call) -> bool:
    """Whether a call stores a Job."""
    return call.resource == "jobs" and call.code == 201


def _is_status(call: Call) -> bool:
    return call.resource == "lorafinetunes/status"

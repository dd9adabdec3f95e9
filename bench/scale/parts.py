"""What is measured, part by part. Each returns numbers for operator.json."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from bench.scale.audit import Call, by_operator, by_run, count_calls, launch_calls, life_calls
from bench.scale.bench import Bench, is_created, is_launched, median, quantile
from bench.scale.client import RUNS, BenchError, EtcdClient, access_to
from bench.scale.floor import Floor, Launch
from bench.scale.memory import measure_memory
from bench.scale.nodes import Nodes
from bench.scale.process import OperatorProcess, usage
from bench.scale.proxy import CALM, Trouble, run_proxy, write_kubeconfig
from bench.scale.residents import Template, fetch_template, make_residents

Numbers = dict[str, Any]

_LAST_POD = "-1-abcde"
"""How the name of the second pod of a gang of two ends."""

_RECORDED, _FLOOR, ROUND = "recorded", "floor", "round"
"""Namespaces of the launch that is recorded, and of those that are made like it."""


async def make_templates(bench: Bench, nodes: Nodes) -> tuple[Template, Template, float]:
    """A finished and a waiting run, brought there by the operator, and its resident memory with just these, in MiB."""
    namespace = bench.namespaces[0]
    with bench.operator() as operator:
        await operator.settle(0)
        mark = bench.audit.mark()
        nodes.start()
        done = await bench.create(1)
        await bench.wait_calls(mark, "a run that succeeds", done, lambda call: ".succeeded" in call.name)
        nodes.hold()
        nodes.take()
        held = await bench.create(1)
        # Both of its pods: what is said of one alone is written anew, by whichever operator sees the other.
        await bench.wait_for_status(held[0], "a run that waits", lambda status: _LAST_POD in json.dumps(status))
        await operator.rest()
        rss = operator.usage().rss
    finished, waiting = [await fetch_template(bench.client, namespace, name) for name in (*done, *held)]
    return finished, waiting, rss


async def record_launch(bench: Bench) -> Launch:
    """The calls by which the operator launches a run, Event included."""
    for namespace in (_RECORDED, _FLOOR, ROUND):
        await bench.client.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    async with bench.client.as_user(bench.operator_pair) as client, run_proxy(client, CALM) as proxy:
        kubeconfig = write_kubeconfig(bench.plane.directory / "proxy.kubeconfig", proxy.port)
        with bench.operator(kubeconfig=kubeconfig, namespaces=[_RECORDED]) as operator:
            await operator.settle(0)
            mark, proxy.writes = bench.audit.mark(), []
            names = await bench.create(1, namespaces=[_RECORDED])
            await bench.wait_calls(mark, "launched to be recorded", names, lambda call: call.resource == "events")
            await operator.rest()
            launch = Launch.of(proxy.writes)
    await bench.clear(_RECORDED)
    return launch


async def populate(bench: Bench, finished: Template, waiting: Template) -> Numbers:
    """Makes the resident runs."""
    begin, size = time.monotonic(), bench.size
    counts = {"finished": (finished, size.finished), "waiting": (waiting, size.waiting)}
    async with EtcdClient(bench.plane) as etcd:
        await make_residents(etcd, bench.namespaces, counts)
    await bench.wait_for_api_server()
    return {"finished": size.finished, "waiting": size.waiting, "madeInSeconds": round(time.monotonic() - begin)}


async def measure_restart(bench: Bench, operator: OperatorProcess, mark: int, empty_mib: float) -> Numbers:
    """An operator that starts with all residents there: how long, how much memory, which calls."""
    seconds = await operator.settle(bench.size.residents)
    looked = operator.usage()
    await operator.rest()
    rested = operator.usage()
    calls = by_operator(bench.audit.since(mark))
    return {
        "secondsUntilAllSeen": round(seconds, 1),
        "cpuSecondsUntilAllSeen": round(looked.cpu, 1),
        "cpuSecondsUntilAtRest": round(rested.cpu, 1),
        "rssMiB": round(rested.rss, 1),
        "peakMiB": round(rested.peak, 1),
        "kibPerRun": round((rested.rss - empty_mib) * 1024 / bench.size.residents, 2),
        "calls": count_calls(calls),
        "writes": sum(call.writes for call in calls),
    }


async def measure_idle(bench: Bench, operator: OperatorProcess) -> Numbers:
    """Nothing happens: which calls does the operator make?"""
    mark, before = bench.audit.mark(), operator.usage().cpu
    await asyncio.sleep(bench.size.idle_seconds)
    calls = by_operator(bench.audit.since(mark))
    cpu = operator.usage().cpu - before
    seconds = bench.size.idle_seconds
    return {"seconds": seconds, "calls": len(calls), "cpuShare": round(cpu / seconds, 4)}


def latencies(calls: Sequence[Call], names: Sequence[str]) -> list[float]:
    """Milliseconds from the moment when the API server received a run until it had stored its Job."""
    received = {call.name: call.received for call in calls if is_created(call)}
    stored = {call.run: call.answered for call in calls if call.resource == "jobs" and call.code == 201}
    return [1000 * (stored[name] - received[name]) for name in names]


async def measure_launches(bench: Bench, operator: OperatorProcess | Floor, namespaces: Sequence[str] = ()) -> Numbers:
    """Runs that come one by one, ``rate`` a second. Nobody makes pods meanwhile: that would be most of the work.

    The first ones find processes that have slept, and are told of apart from the others.
    """
    memory = await asyncio.to_thread(measure_memory, 1 / bench.size.rate)
    mark, before = bench.audit.mark(), operator.usage().cpu
    first = bench.size.first_launches
    names = await bench.create(first + bench.size.launches, bench.size.rate, namespaces)
    await bench.wait_calls(mark, "launched one by one", names, is_launched)
    every = latencies(bench.audit.since(mark), names)
    times = every[first:]
    return {
        "runs": len(times),
        "first": first,
        "firstMaxMs": round(max(every[:first]), 1),
        "perSecond": bench.size.rate,
        "load": round(os.getloadavg()[0], 1),
        **memory,
        "p50Ms": round(quantile(times, 0.5), 1),
        "p90Ms": round(quantile(times, 0.9), 1),
        "p99Ms": round(quantile(times, 0.99), 1),
        "maxMs": round(max(times), 1),
        "operatorCpuMsPerRun": round(1000 * (operator.usage().cpu - before) / len(names), 2),
    }


async def measure_burst(bench: Bench, operator: OperatorProcess | Floor, namespaces: Sequence[str] = ()) -> Numbers:
    """Runs that come all at once: how fast are they launched?"""
    pids = bench.plane.pids()

    def used() -> list[float]:
        return [operator.usage().cpu, usage(pids["kube-apiserver"]).cpu, usage(pids["etcd"]).cpu]

    mark, before = bench.audit.mark(), used()
    names = await bench.create(bench.size.burst, namespaces=namespaces)
    await bench.wait_calls(mark, "launched in a burst", names, is_launched)
    own, server, etcd = (round(1000 * (new - old) / len(names), 2) for new, old in zip(used(), before, strict=True))
    calls = bench.audit.since(mark)
    created = [call for call in calls if is_created(call)]
    first, last = min(call.received for call in created), max(call.answered for call in created)
    end = max(call.answered for call in calls if is_launched(call))
    return {
        "runs": len(names),
        "seconds": round(end - first, 2),
        "perSecond": round(len(names) / (end - first), 1),
        "createdInSeconds": round(last - first, 2),
        "operatorCpuMsPerRun": own,
        "apiServerCpuMsPerRun": server,
        "etcdCpuMsPerRun": etcd,
        "callsPerRun": round(len(by_operator(calls)) / len(names), 2),
    }


async def measure_floor(bench: Bench, launch: Launch) -> Numbers:
    """The same launches and the same burst by a process that makes the same calls and does nothing else."""
    spaces = [_FLOOR]
    with Floor(access_to(bench.plane, bench.operator_pair), launch, bench.plane.directory) as floor:
        await floor.settle()
        launches = await measure_launches(bench, floor, spaces)
        burst = await measure_burst(bench, floor, spaces)
    await bench.clear(_FLOOR)  # no operator is to find what it has not launched itself
    return {"launches": launches, "burst": burst}


async def measure_lives(bench: Bench, operator: OperatorProcess, nodes: Nodes) -> Numbers:
    """Runs that live from their creation to success: which calls does that take?"""
    nodes.start()
    mark, before, begin = bench.audit.mark(), operator.usage().cpu, time.monotonic()
    names = await bench.create(bench.size.lives)
    await bench.wait_calls(mark, "lived", names, lambda call: ".succeeded" in call.name)
    seconds, cpu = time.monotonic() - begin, operator.usage().cpu - before
    alone = await bench.create(max(1, bench.size.lives // 10), nodes=1)
    await bench.wait_calls(mark, "lived alone", alone, lambda call: ".succeeded" in call.name)
    nodes.hold()
    if nodes.errors:
        raise BenchError(f"the nodes cannot be played: {nodes.errors[0]}")
    runs = by_run(bench.audit.since(mark))
    return {
        "runs": len(names),
        "perSecond": round(len(names) / seconds, 1),
        "callsPerLaunch": _spread([len(launch_calls(runs[name])) for name in names]),
        "callsPerLaunchAlone": _spread([len(launch_calls(runs[name])) for name in alone]),
        "launchByKind": _per_run([launch_calls(runs[name]) for name in names]),
        "launchAloneByKind": _per_run([launch_calls(runs[name]) for name in alone]),
        "callsPerLife": _spread([len(life_calls(runs[name])) for name in (*names, *alone)]),
        "eventsAndProgressPerLife": _spread([len(runs[name]) - len(life_calls(runs[name])) for name in names]),
        "oneLife": [f"{call.verb} {call.resource}" for call in runs[names[0]]],
        "operatorCpuMsPerRun": round(1000 * cpu / len(names), 2),
    }


def _per_run(runs: Sequence[Sequence[Call]]) -> dict[str, float]:
    """Calls a run, by kind."""
    counts = count_calls(call for calls in runs for call in calls)
    return {kind: round(count / len(runs), 2) for kind, count in counts.items()}


def _spread(counts: Sequence[int]) -> Numbers:
    return {"min": min(counts), "median": median(counts), "max": max(counts)}


async def measure_trouble(bench: Bench, nodes: Nodes) -> Numbers:
    """The API server refuses and is late, and nothing is lost: every run succeeds at its first attempt, in one Job."""
    namespace, trouble = "troubled", Trouble()
    await bench.client.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    async with bench.client.as_user(bench.operator_pair) as client, run_proxy(client, trouble) as proxy:
        kubeconfig = write_kubeconfig(bench.plane.directory / "proxy.kubeconfig", proxy.port)
        mark = bench.audit.mark()
        nodes.start()
        with bench.operator(kubeconfig=kubeconfig, namespaces=[namespace]) as operator:
            await operator.settle(0)
            begin = time.monotonic()
            names = await bench.create(bench.size.troubled, namespaces=[namespace])
            await bench.wait_calls(mark, "succeeded in trouble", names, lambda call: ".succeeded" in call.name)
            seconds = time.monotonic() - begin
    jobs = [call.run for call in bench.audit.since(mark) if call.resource == "jobs" and call.code == 201]
    found = (await bench.client.call("GET", RUNS.format(namespace)))["items"]
    phases = [f"{run['status'].get('phase')} {run['status'].get('attempt')}" for run in found]
    return {
        "runs": len(names),
        "seconds": round(seconds, 1),
        "refused": proxy.counts["refused"],
        "late": proxy.counts["late"],
        "passed": proxy.counts["passed"],
        "succeededAtFirstAttempt": phases.count("Succeeded 1"),
        "jobsMade": len(jobs),
        "jobsMadeTwice": len(jobs) - len(set(jobs)),
    }

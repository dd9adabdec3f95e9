"""The same for each contender: runs of two nodes, one by one and all at once, until their last Job is stored."""

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from bench.peers.contenders import Contender, Usages
from bench.scale.audit import Audit, Call
from bench.scale.bench import quantile
from bench.scale.client import BenchError, Client, access_to, run_all
from bench.scale.process import usage
from devcluster import ControlPlane

Numbers = dict[str, Any]

_AT_ONCE = 32
_NAMESPACES = 20


@dataclass(frozen=True)
class Size:
    """How much is done in each round. The ``first`` runs of those that come one by one are not counted."""

    rounds: int
    rate: float
    first: int
    launches: int
    burst: int
    patience: float = 300.0


FULL = Size(rounds=3, rate=10.0, first=20, launches=300, burst=1000)
TINY = Size(rounds=1, rate=5.0, first=2, launches=6, burst=10)


class _Round:
    """One contender on a control plane of its own."""

    def __init__(self, contender: Contender, plane: ControlPlane, client: Client, audit: Audit, size: Size) -> None:
        self._contender = contender
        self._plane = plane
        self._client = client
        self._audit = audit
        self._size = size
        self._numbers = itertools.count()

    async def launch(self, count: int, rate: float | None = None) -> list[str]:
        """Creates runs, ``rate`` a second or as fast as it goes, and waits until all have their Job."""
        batch, begin, mark = next(self._numbers), time.monotonic(), self._audit.mark()
        places = itertools.cycle(f"team-{number}" for number in range(_NAMESPACES))
        names = [f"run-{batch}-{number}" for number in range(count)]

        async def make(item: tuple[int, str]) -> None:
            number, name = item
            if rate is not None:
                await asyncio.sleep(begin + number / rate - time.monotonic())
            path = self._contender.path.format(next(places))
            await self._client.call("POST", path, self._contender.build(name))

        await run_all(enumerate(names), make, _AT_ONCE)
        await self._wait_for_jobs(mark, names)
        return names

    async def _wait_for_jobs(self, mark: int, names: Sequence[str]) -> None:
        missing, deadline = set(names), time.monotonic() + self._size.patience
        while missing:
            calls = self._audit.since(mark)
            missing -= {self._contender.run_of(call.name) for call in calls if is_job(call)}
            if time.monotonic() > deadline:
                raise BenchError(f"{self._contender.title}: {len(missing)} runs have no Job, such as {min(missing)}")
            await asyncio.sleep(0.1 if missing else 0)

    async def measure(self, usages: Usages) -> Numbers:
        """Both parts."""
        await self.launch(1)
        mark = self._audit.mark()
        names = await self.launch(self._size.first + self._size.launches, self._size.rate)
        times = latencies(self._audit.since(mark), names, self._contender.kind, self._contender.run_of)
        one_by_one = {
            "runs": self._size.launches,
            "perSecond": self._size.rate,
            "load": round(os.getloadavg()[0], 1),
            "p50Ms": round(quantile(times[self._size.first :], 0.5), 1),
            "p99Ms": round(quantile(times[self._size.first :], 0.99), 1),
            "maxMs": round(max(times[self._size.first :]), 1),
        }
        await self._rest()
        return {"launches": one_by_one, "burst": await self._measure_burst(usages)}

    async def _measure_burst(self, usages: Usages) -> Numbers:
        pids = self._plane.pids()

        def used() -> list[float]:
            own = sum(each.cpu for each in usages())
            return [own, usage(pids["kube-apiserver"]).cpu, usage(pids["etcd"]).cpu]

        mark, before = self._audit.mark(), used()
        names = await self.launch(self._size.burst)
        at_last_job = used()
        seconds = burst_seconds(self._audit.since(mark), names, self._contender.kind, self._contender.run_of)
        await self._rest()
        spent = [round(1000 * (new - old) / len(names), 2) for new, old in zip(at_last_job, before, strict=True)]
        calls = [call for call in self._audit.since(mark) if call.user in self._contender.users]
        return {
            "runs": len(names),
            "seconds": round(seconds, 2),
            "perSecond": round(len(names) / seconds, 1),
            "ownCpuMsPerRun": spent[0],
            "apiServerCpuMsPerRun": spent[1],
            "etcdCpuMsPerRun": spent[2],
            "rssMiB": round(sum(each.rss for each in usages()), 1),
            "callsPerRun": per_run(calls, len(names)),
        }

    async def _rest(self) -> None:
        """Waits until the contender calls no more, leases aside."""
        deadline = time.monotonic() + self._size.patience
        mark = self._audit.mark()
        while time.monotonic() < deadline:
            await asyncio.sleep(2.0)
            new = self._audit.since(mark)
            mark += len(new)
            if not any(is_work(call) and call.user in self._contender.users for call in new):
                return
        raise BenchError(f"{self._contender.title} does not come to rest")


async def measure_round(contender: Contender, plane: ControlPlane, size: Size) -> Numbers:
    """One round of one contender on ``plane``, which nobody has used before."""
    async with Client(access_to(plane)) as client:
        for number in range(_NAMESPACES):
            await client.call("POST", "/api/v1/namespaces", {"metadata": {"name": f"team-{number}"}})
        with closing(Audit(plane.files.audit_log, contender.users, contender.kind)) as audit:
            async with contender.running(plane, client) as usages:
                return await _Round(contender, plane, client, audit, size).measure(usages)


def is_job(call: Call) -> bool:
    """Whether a call stores a Job."""
    return call.resource == "jobs" and call.code == 201


def is_work(call: Call) -> bool:
    """Whether a call has to do with runs: watches and the leases of an election go on always."""
    return call.verb != "watch" and call.resource != "leases"


def per_run(calls: Iterable[Call], runs: int) -> dict[str, float]:
    """Calls a run, by kind, the most frequent first."""
    counts = Counter(f"{call.verb} {call.resource or 'discovery'}" for call in calls if is_work(call))
    return {kind: round(count / runs, 2) for kind, count in counts.most_common()}


def latencies(calls: Sequence[Call], names: Sequence[str], kind: str, run_of: Callable[[str], str]) -> list[float]:
    """Milliseconds from the moment when the API server received a run until it had stored the last of its Jobs."""
    received = {call.name: call.received for call in calls if _is_created(call, kind)}
    stored = _stored(calls, run_of)
    return [1000 * (stored[name] - received[name]) for name in names]


def burst_seconds(calls: Sequence[Call], names: Sequence[str], kind: str, run_of: Callable[[str], str]) -> float:
    """Seconds from the first run to the last Job of all."""
    stored = _stored(calls, run_of)
    first = min(call.received for call in calls if _is_created(call, kind))
    return max(stored[name] for name in names) - first


def _is_created(call: Call, kind: str) -> bool:
    return call.verb == "create" and call.resource == kind and call.code == 201


def _stored(calls: Iterable[Call], run_of: Callable[[str], str]) -> dict[str, float]:
    """When the last Job of each run was stored."""
    stored: dict[str, float] = {}
    for call in calls:
        if is_job(call):
            run = run_of(call.name)
            stored[run] = max(call.answered, stored.get(run, 0.0))
    return stored

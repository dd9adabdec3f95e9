"""The soak itself: stories, faults and operators at once on one control plane, and then the reckoning."""

import asyncio
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from bench.scale.audit import OPERATOR, Audit, by_operator, count_calls
from bench.scale.bench import create_role
from bench.scale.client import JOBS, PODS, RUNS, BenchError, Raw, access_to
from bench.scale.proxy import CALM, Proxy, run_proxy, write_kubeconfig
from bench.soak.checks import (
    Found,
    find_growth,
    find_leftovers,
    find_orphans,
    find_wrong_ends,
    find_wrong_events,
    find_wrong_jobs,
    find_wrong_trainers,
)
from bench.soak.faults import Faults, plan_faults
from bench.soak.kinds import make_stories
from bench.soak.operators import Operators, run_operators
from bench.soak.player import Action
from bench.soak.stories import Story, compute_outcome
from bench.soak.upgrades import BEFORE, EARLY, READS, Upgrades, find_releases
from bench.soak.world import PatientClient, World, in_background, play_world
from devcluster import ControlPlane
from lora_operator.names import RUN_LABEL

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much, and for how long.

    Runs are created in the first ``creating`` of the time, and faults come until ``ill``, both shares. ``every``:
    seconds between two faults, on the average. ``runs_for``: the longest time that pods run, in seconds. At the share
    ``looked_at`` the memory of the operator is looked at first, or once it has worked, if that is later.
    """

    runs: int
    seconds: float
    every: float
    runs_for: float
    creating: float
    ill: float
    looked_at: float


FULL = Size(runs=200, seconds=1800.0, every=8.0, runs_for=30.0, creating=0.75, ill=0.9, looked_at=0.4)
TINY = Size(runs=32, seconds=60.0, every=3.0, runs_for=2.0, creating=0.5, ill=0.7, looked_at=2 / 3)

_KILLED_UNTIL = 0.25
"""Share of the time: the last kill of the operator. The last upgrade is soon after it."""

MARGIN_MIB = 8.0
KIB_PER_RUN = 15.0
"""What the operator may grow by from the first look to the last: for each run that has come in between, and on top.

Measured on top (docs/benchmarks/soak.md): 3 MiB in the last 20 minutes, and 7 in the first six minutes of a process,
which is what a shorter soak sees.
"""

_SETTLE_SECONDS = 180.0
_LOOK_SECONDS = 2.0
_EVENTS = "/apis/events.k8s.io/v1/events"


class Soak:
    """One soak on one control plane. ``say`` is told what happens."""

    def __init__(self, plane: ControlPlane, size: Size, seed: int, say: Callable[[str], None]) -> None:
        self._plane = plane
        self._size = size
        self._seed = seed
        self._say = say
        early = EARLY * size.seconds
        self._told = make_stories(seed, size.runs, size.creating * size.seconds, size.runs_for, early)
        self._planned = plan_faults(seed, size.ill * size.seconds, size.every, _KILLED_UNTIL * size.seconds, early)
        self._begin = time.monotonic()

    async def run(self) -> Numbers:
        """All of it. Returns what is written to soak.json; ``wrong`` has what is not as it has to be."""
        plane = self._plane
        known = await asyncio.to_thread(find_releases, plane.directory / "next")
        pair = plane.files.authority.issue(OPERATOR, OPERATOR, [])
        administrator, operator = access_to(plane), access_to(plane, pair)
        async with PatientClient(administrator) as client, PatientClient(operator) as as_operator:
            await create_role(client)
            upgrades = Upgrades(plane, client, known, self._log)
            await upgrades.begin()
            async with run_proxy(as_operator, CALM, self._seed) as proxy:
                kubeconfig = write_kubeconfig(plane.directory / "proxy.kubeconfig", proxy.port)
                with closing(Audit(plane.files.audit_log)) as audit:
                    async with (
                        play_world(client, self._told, plane.files.authority) as world,
                        run_operators(kubeconfig, plane.logs, known[BEFORE], self._log) as operators,
                    ):
                        self._begin = time.monotonic()
                        return await self._soak(client, proxy, audit, world, operators, upgrades)

    async def _soak(
        self,
        client: PatientClient,
        proxy: Proxy,
        audit: Audit,
        world: World,
        operators: Operators,
        upgrades: Upgrades,
    ) -> Numbers:
        self._log(f"{len(self._told)} runs and {len(self._planned)} faults of seed {self._seed}")
        faults = Faults(self._plane, client, operators, proxy, upgrades, random.Random(self._seed), self._log)
        async with in_background(_keep_reading(audit), faults.keep_controllers()):
            await asyncio.gather(faults.run(self._planned), upgrades.play(operators, world, self._size.seconds))
            self._log("no more faults")
            await asyncio.sleep(max(0.0, self._size.seconds - self._seconds()))
            settled = await self._settle(client, world)
            wrong = self._check(settled, await client.items(_EVENTS), world)
            memory, growth = await self._measure(operators)
            leaked = await self._clear(client, operators)
        audit.read()
        calls = by_operator(audit.calls)
        outcomes = [compute_outcome(story) for story in self._told]
        return {
            "seed": self._seed,
            "minutes": round(self._size.seconds / 60, 2),
            "seconds": round(self._seconds()),
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
            "kinds": dict(Counter(story.kind for story in self._told)),
            "ends": dict(Counter(str(outcome.phase or "gone") for outcome in outcomes)),
            "runs": len(outcomes),
            "attempts": sum(outcome.attempt for outcome in outcomes),
            "failures": dict(Counter(str(several[0]) for outcome in outcomes for several in outcome.failures)),
            "faults": dict(faults.counts),
            "upgrades": dict(upgrades.counts),
            "sidecars": world.injected,
            "requests": dict(proxy.counts),
            "operators": {"started": operators.started, "failedStarts": operators.failed_starts},
            "memory": memory,
            "calls": count_calls(calls),
            "wrong": [*wrong, *find_wrong_jobs(self._told, calls), *operators.failures, *growth, *leaked],
        }

    async def _settle(self, client: PatientClient, world: World) -> Found:
        """Waits until every run is where its story ends and nothing is left over, or for long; returns what there is.

        That nothing is left to be played comes first: what a story does to a run comes after what the operator does.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            found = await fetch_found(client, self._told)
            if world.at_rest and not self._find_unsettled(found):
                return found
            if time.monotonic() > deadline:
                self._log("the runs do not settle")
                return found
            await asyncio.sleep(_LOOK_SECONDS)

    def _find_unsettled(self, found: Found) -> list[str]:
        return [*find_wrong_ends(self._told, found), *find_orphans(found), *find_leftovers(self._told, found)]

    def _check(self, found: Found, events: Sequence[Raw], world: World) -> list[str]:
        names = {story.name for story in self._told}
        about_runs = [event for event in events if event["regarding"].get("name") in names]
        return [
            *self._find_unsettled(found),
            *find_wrong_events(self._told, about_runs),
            *find_wrong_trainers(world.trainers, READS, about_runs),
        ]

    async def _measure(self, operators: Operators) -> tuple[Numbers, list[str]]:
        """The memory of the operator that has lived on, early and now that it is at rest."""
        first = operators.first_look(self._size.looked_at * self._size.seconds)
        await operators.main.rest()
        usage = operators.main.usage()
        came = sum(1 for story in self._told if story.at > first.at)
        memory = {
            "firstAtSecond": round(first.at),
            "firstMiB": round(first.rss, 1),
            "lastMiB": round(usage.rss, 1),
            "peakMiB": round(usage.peak, 1),
            "moreRuns": came,
            "cpuSeconds": round(usage.cpu, 1),
            "perMinuteMiB": [round(one, 1) for one in operators.every_minute()],
        }
        return memory, find_growth(first.rss, usage.rss, came, KIB_PER_RUN, MARGIN_MIB)

    async def _clear(self, client: PatientClient, operators: Operators) -> list[str]:
        """Deletes every run: all that belongs to it goes, in the cluster and in the operator."""
        for story in self._told:
            path = f"{RUNS.format(story.namespace)}/{story.name}"
            await client.try_call(Action("DELETE", path, {"propagationPolicy": "Background"}))
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            left = [item["metadata"]["name"] for item in (await fetch_found(client, self._told)).all()]
            metrics = await asyncio.to_thread(operators.main.metrics)
            known = sum(value for name, value in metrics.items() if name.startswith("lora_operator_runs{"))
            if metrics and not left and not known:
                return []
            if time.monotonic() > deadline:
                return [f"after all runs were deleted there are {left}, and the operator knows {known:.0f} runs"]
            await asyncio.sleep(_LOOK_SECONDS)

    def _seconds(self) -> float:
        return time.monotonic() - self._begin

    def _log(self, text: str) -> None:
        self._say(f"{self._seconds():7.1f} s  {text}")


async def _keep_reading(audit: Audit) -> None:
    """Reads the audit log before the API server moves it aside, until it is cancelled."""
    while True:
        audit.read()
        await asyncio.sleep(_LOOK_SECONDS)


async def fetch_found(client: PatientClient, told: Sequence[Story]) -> Found:
    """All that there is of the runs."""
    kinds = {"LoRAFineTune": RUNS, "Job": JOBS, "Pod": PODS}
    kinds["Service"] = "/api/v1/namespaces/{}/services"
    kinds["NetworkPolicy"] = "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"
    lists: dict[str, list[Raw]] = {}
    for kind, path in kinds.items():
        selector = "" if kind == "LoRAFineTune" else f"?labelSelector={RUN_LABEL}"
        lists[kind] = [
            {**item, "kind": kind}
            for namespace in sorted({story.namespace for story in told})
            for item in await client.items(path.format(namespace) + selector)
        ]
    return Found(*lists.values())


def check(result: Numbers) -> None:
    """Says what is wrong.

    Raises:
        BenchError: something is.
    """
    if result["wrong"]:
        raise BenchError(f"seed {result['seed']}: " + "\n".join(result["wrong"]))

"""What goes wrong around the runs: planned from a seed, then done to control plane, operators and objects."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.scale.client import MERGE, RUNS, Raw
from bench.scale.proxy import Proxy
from bench.soak.operators import Operators
from bench.soak.player import Action, is_over
from bench.soak.upgrades import AFTER, Upgrades
from bench.soak.world import PatientClient
from devcluster import ControlPlane
from lora_operator.names import service_name

ALL_RUNS = "/apis/lorafinetune.io/v1alpha1/lorafinetunes"

OPERATOR_KILLED = "operator killed"
LASTING = {
    OPERATOR_KILLED: (0.0, 5.0),
    "operator frozen": (1.0, 12.0),
    "two operators": (5.0, 25.0),
    "a newer operator beside": (5.0, 25.0),
    "newer CRDs": (2.0, 10.0),
    "API server killed": (0.0, 5.0),
    "etcd stands still": (1.0, 8.0),
    "controllers killed": (0.0, 5.0),
    "calls refused (429)": (3.0, 15.0),
    "calls refused (503)": (3.0, 15.0),
    "answers late": (3.0, 15.0),
    "answers lost": (3.0, 15.0),
}
"""Faults, each with the shortest and the longest time that it lasts, in seconds."""

HANDS = ("Service deleted", "status edited")
"""What people do to objects that are the operator's."""

KINDS = (*LASTING, *HANDS)

_TROUBLES: Mapping[str, dict[str, Any]] = {
    "calls refused (429)": {"refused": 0.4},
    "calls refused (503)": {"unavailable": 0.4},
    "answers late": {"late": 0.5},
    "answers lost": {"lost": 0.3},
}
_CONTROLLERS = "kube-controller-manager"
_KEEP_SECONDS = 2.0
_NONSENSE = {"phase": "Succeeded", "reason": "Because", "conditions": []}


@dataclass(frozen=True)
class Fault:
    """One fault. Times are in seconds; ``at`` counts from the start."""

    at: float
    kind: str
    lasts: float = 0.0


def plan_faults(seed: int, seconds: float, every: float, last_kill: float, begin: float = 0.0) -> tuple[Fault, ...]:
    """Faults from ``begin`` to ``seconds``, one in ``every`` seconds on the average; every kind before one comes again.

    The operator is killed before ``last_kill`` only, so that one process lives on and shows whether it grows.
    """
    draw = random.Random(f"faults {seed}")
    faults: list[Fault] = []
    bag: list[str] = []
    at = begin + draw.expovariate(1 / every)
    while at < seconds:
        if not bag:
            bag = draw.sample(KINDS, len(KINDS))
        kind = bag.pop()
        if kind != OPERATOR_KILLED or at < last_kill:
            faults.append(Fault(at, kind, draw.uniform(*LASTING[kind]) if kind in LASTING else 0.0))
            at += draw.expovariate(1 / every)
    if all(fault.kind != OPERATOR_KILLED for fault in faults):
        faults.append(Fault(draw.uniform(begin, last_kill), OPERATOR_KILLED, draw.uniform(*LASTING[OPERATOR_KILLED])))
    return tuple(sorted(faults, key=lambda fault: fault.at))


class Faults:
    """Does what was planned. ``counts`` holds what was done, by kind."""

    def __init__(
        self,
        plane: ControlPlane,
        client: PatientClient,
        operators: Operators,
        proxy: Proxy,
        upgrades: Upgrades,
        draw: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self._plane = plane
        self._client = client
        self._operators = operators
        self._proxy = proxy
        self._upgrades = upgrades
        self._random = draw
        self._say = say
        self._plane_held = asyncio.Lock()
        self.counts: Counter[str] = Counter()

    async def run(self, faults: tuple[Fault, ...]) -> None:
        """Does all of ``faults`` at their times, which may overlap; ends when the last one is over."""
        begin = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, begin + fault.at - asyncio.get_running_loop().time()))
                group.create_task(self._do(fault))

    async def keep_controllers(self) -> None:
        """Starts the controllers again when they have ended, as they do that find no API server, until cancelled."""
        while True:
            async with self._plane_held:
                if _CONTROLLERS not in await asyncio.to_thread(self._plane.pids):
                    await asyncio.to_thread(self._plane.start_controller_manager)
            await asyncio.sleep(_KEEP_SECONDS)

    async def _do(self, fault: Fault) -> None:
        self._say(f"{fault.kind}, {fault.lasts:.1f} s")
        if fault.kind in _TROUBLES:
            await self._make_trouble(fault)
        elif fault.kind in HANDS:
            if not await self._meddle(fault.kind):
                return
        elif fault.kind == OPERATOR_KILLED:
            await self._operators.kill(fault.lasts)
        elif fault.kind == "operator frozen":
            await self._operators.freeze(fault.lasts)
        elif fault.kind in ("two operators", "a newer operator beside"):
            release = self._upgrades.known[AFTER] if fault.kind != "two operators" else None
            await self._operators.double(fault.lasts, self._random.choice((signal.SIGKILL, signal.SIGTERM)), release)
        elif fault.kind == "newer CRDs":
            await self._upgrades.visit(fault.lasts)
        else:
            async with self._plane_held:
                await self._hit_plane(fault)
        self.counts[fault.kind] += 1

    async def _make_trouble(self, fault: Fault) -> None:
        """Makes the proxy worse, and good again: another trouble may have come in the meantime."""
        worse = _TROUBLES[fault.kind]
        self._proxy.trouble = replace(self._proxy.trouble, **worse)
        await asyncio.sleep(fault.lasts)
        good: dict[str, Any] = dict.fromkeys(worse, 0.0)
        self._proxy.trouble = replace(self._proxy.trouble, **good)

    async def _hit_plane(self, fault: Fault) -> None:
        plane = self._plane
        if fault.kind == "etcd stands still":
            etcd = (await asyncio.to_thread(plane.pids))["etcd"]
            os.kill(etcd, signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                os.kill(etcd, signal.SIGCONT)
            return
        kill, start = (
            (plane.kill_api_server, plane.start_api_server)
            if fault.kind == "API server killed"
            else (plane.stop_controller_manager, plane.start_controller_manager)
        )
        await asyncio.to_thread(kill)
        await asyncio.sleep(fault.lasts)
        await asyncio.to_thread(start)

    async def _meddle(self, kind: str) -> bool:
        """Deletes a child of some run that has not ended, or edits its status; ``False`` where there is none."""
        runs = [run for run in await self._client.items(ALL_RUNS) if _may_be_touched(run)]
        if not runs:
            return False
        run = self._random.choice(runs)
        metadata = run["metadata"]
        if kind == "status edited":
            # Only as it was seen: a run that has ended in the meantime is nobody's to start again.
            body: Raw = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": _NONSENSE}
            path = f"{RUNS.format(metadata['namespace'])}/{metadata['name']}/status"
            return await self._client.try_call(Action("PATCH", path, body, MERGE))
        path = f"/api/v1/namespaces/{metadata['namespace']}/services/{service_name(metadata['name'])}"
        return await self._client.try_call(Action("DELETE", path))


def _may_be_touched(run: Raw) -> bool:
    """Whether ``run`` has an attempt and no end; the time that a run has run is kept in its conditions alone."""
    overdue = "activeDeadlineSeconds" in run["spec"]["runPolicy"]
    return bool(run.get("status", {}).get("attempt")) and not is_over(run) and not overdue

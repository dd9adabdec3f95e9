"""The releases that the soak goes through while its runs live: one upgrade from the last, one to the next and back.

Operator and CRDs change one at a time, so that each of them is once the newer of the two. In between it is decided by
chance (faults.py) when an operator and CRDs of the next release come and go.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.scale.audit import OPERATOR
from bench.scale.client import BenchError, Raw
from bench.soak.operators import Operators
from bench.soak.player import Action
from bench.soak.world import PatientClient, World
from devcluster import ControlPlane, DevclusterError
from lora_api import RUN_VERSION
from tests.skew import releases
from tests.skew.releases import Release
from tests.support.install import wait_for_crds

BEFORE, TODAY, AFTER = "before", "today", "after"
CRDS, PROGRAM = "CRDs", "operator"

EARLY = 0.1
"""Share of the time in which the release before may still be there, if nothing is slow."""

STEPS: tuple[tuple[float, str, str], ...] = (
    (0.05, PROGRAM, TODAY),
    (0.08, CRDS, TODAY),
    (0.15, CRDS, AFTER),
    (0.18, PROGRAM, AFTER),
    (0.24, CRDS, TODAY),
    (0.28, PROGRAM, TODAY),
)
"""Shares of the time, what changes then, and the release that it changes to. The operator of the last lives on."""

READS: Mapping[str, int] = {"trainer:before": 1, "trainer:today": RUN_VERSION, "trainer:after": RUN_VERSION + 1}
"""Newest run document that the image of each release reads."""

_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_OLD_ROLE = f"{OPERATOR}-before"
_PATIENCE = 120.0
_PRINT_ROLE = """
import json
from lora_operator.rights import RBAC
print(json.dumps([{"apiGroups": [rule.group], "resources": rule.resources, "verbs": rule.verbs} for rule in RBAC]))
"""


def find_releases(target: Path) -> dict[str, Release]:
    """The three releases; the next one is made below ``target``."""
    return {release.name: release for release in (releases.before(), releases.today(), releases.after(target))}


class Upgrades:
    """Changes releases. ``counts`` has what was done."""

    def __init__(
        self,
        plane: ControlPlane,
        client: PatientClient,
        known: Mapping[str, Release],
        say: Callable[[str], None],
    ) -> None:
        self._plane = plane
        self._client = client
        self._say = say
        self._held = asyncio.Lock()
        self._crds = known[BEFORE]
        self.known = known
        self.counts: Counter[str] = Counter()

    async def begin(self) -> None:
        """Installs the release before: its CRDs, and what its role has beyond that of today."""
        await self._apply(self.known[BEFORE])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, self.known[BEFORE].code))}
        command = [sys.executable, "-c", _PRINT_ROLE]
        printed = await asyncio.to_thread(subprocess.check_output, command, env=environment)
        role: Raw = {"metadata": {"name": _OLD_ROLE}, "rules": json.loads(printed)}
        group = "rbac.authorization.k8s.io"
        binding = {
            "metadata": {"name": _OLD_ROLE},
            "roleRef": {"kind": "ClusterRole", "name": _OLD_ROLE, "apiGroup": group},
            "subjects": [{"kind": "User", "name": OPERATOR, "apiGroup": group}],
        }
        await self._client.call("POST", f"{_RBAC}/clusterroles", role)
        await self._client.call("POST", f"{_RBAC}/clusterrolebindings", binding)

    async def play(self, operators: Operators, world: World, seconds: float) -> None:
        """All of ``STEPS``, in a soak of ``seconds``."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for share, what, name in STEPS:
            await asyncio.sleep(max(0.0, begin + share * seconds - loop.time()))
            release = self.known[name]
            self._say(f"{what} of {name}")
            if what == CRDS:
                async with self._held:
                    self._crds = release
                    await self._apply(release)
            else:
                await operators.change(release)
                await self._client.try_call(Action("DELETE", f"{_RBAC}/clusterrolebindings/{_OLD_ROLE}"))
            self.counts[f"{what} of {name}"] += 1
            world.upgraded = world.upgraded or (what, name) == (CRDS, TODAY)

    async def visit(self, seconds: float) -> None:
        """Has the CRDs of the next release for a while."""
        async with self._held:
            await self._apply(self.known[AFTER])
            try:
                await asyncio.sleep(seconds)
            finally:
                await self._apply(self._crds)

    async def _apply(self, release: Release) -> None:
        """Puts the CRDs of ``release`` in the place of those that are there, whatever fails on the way."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            try:
                await asyncio.to_thread(self._put, release)
            except DevclusterError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise BenchError(f"the CRDs of {release.name} cannot be put: {error}") from error
                await asyncio.sleep(0.5)
            else:
                return

    def _put(self, release: Release) -> None:
        self._plane.kubectl("apply", f"--filename={release.crds}", "--server-side", "--force-conflicts")
        wait_for_crds(self._plane)

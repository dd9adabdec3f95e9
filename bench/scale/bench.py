"""All that the parts of the bench share: the control plane, the audit log, clients, and the operator's rights."""

import asyncio
import itertools
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

from bench.scale.audit import OPERATOR, Audit, Call
from bench.scale.client import JOBS, PODS, RUNS, BenchError, Client, Raw, access_to, run_all
from bench.scale.process import OperatorProcess
from bench.scale.residents import build_run
from devcluster import ControlPlane
from lora_operator.kube.rights import RBAC
from tests.support.install import install_crds

_AT_ONCE = 32
_BATCH_SECONDS = 300.0


@dataclass(frozen=True)
class Size:
    """How much is done. ``rounds`` is of the launches, bursts and restarts, of which medians are told.

    ``first_launches`` come before the ``launches``, at the same rate.
    """

    finished: int
    waiting: int
    namespaces: int
    rounds: int
    rate: float
    first_launches: int
    launches: int
    burst: int
    lives: int
    idle_seconds: float
    rest_seconds: float
    troubled: int

    @property
    def residents(self) -> int:
        """Runs that are there before anything is measured."""
        return self.finished + self.waiting


FULL = Size(
    finished=9000,
    waiting=1000,
    namespaces=20,
    rounds=3,
    rate=10.0,
    first_launches=20,
    launches=300,
    burst=1000,
    lives=200,
    idle_seconds=45.0,
    rest_seconds=2.0,
    troubled=200,
)
TINY = Size(
    finished=12, waiting=4, namespaces=2, rounds=1, rate=10.0, first_launches=2, launches=6, burst=8, lives=4,
    idle_seconds=1.0, rest_seconds=0.4, troubled=4,
)  # fmt: skip


class Bench:
    """A control plane with the CRDs, and an operator to be started on it."""

    def __init__(self, plane: ControlPlane, client: Client, size: Size) -> None:
        self.plane = plane
        self.client = client
        self.size = size
        self.audit = Audit(plane.files.audit_log)
        self.namespaces = [f"team-{number}" for number in range(size.namespaces)]
        self.operator_pair = plane.files.authority.issue(OPERATOR, OPERATOR, [])
        self.kubeconfig = plane.write_kubeconfig(OPERATOR, OPERATOR)
        self._numbers = itertools.count()

    async def prepare(self) -> None:
        """Makes the CRDs, the namespaces and the operator's role."""
        await asyncio.to_thread(install_crds, self.plane)
        for name in self.namespaces:
            await self.client.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        await create_role(self.client)

    async def wait_for_api_server(self) -> None:
        """Waits until the API server's caches hold all that was written to etcd."""
        for path in ("/apis/lorafinetune.io/v1alpha1/lorafinetunes", "/apis/batch/v1/jobs", "/api/v1/pods"):
            newest = (await self.client.call("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
            # Only a cache can answer this, and only when it is as new.
            cached = f"resourceVersion={newest}&resourceVersionMatch=NotOlderThan&fieldSelector=metadata.name=none"
            await self._wait_until_served(f"{path}?{cached}")

    async def _wait_until_served(self, path: str) -> None:
        async with asyncio.timeout(_BATCH_SECONDS):
            while True:
                try:
                    await self.client.call("GET", path)
                except BenchError:
                    await asyncio.sleep(0.2)
                else:
                    return

    def operator(
        self,
        *,
        kubeconfig: Path | None = None,
        namespaces: Sequence[str] = (),
        samples: Path | None = None,
        flags: Sequence[str] = (),
    ) -> OperatorProcess:
        """Starts an operator, with ``flags`` besides --preflight=off."""
        log = self.plane.logs / "operator.log"
        return OperatorProcess(
            kubeconfig or self.kubeconfig,
            log,
            rest_seconds=self.size.rest_seconds,
            namespaces=namespaces,
            samples=samples,
            flags=("--preflight=off", *flags),
        )

    async def create(
        self, count: int, rate: float | None = None, namespaces: Sequence[str] = (), nodes: int = 2
    ) -> list[str]:
        """Creates runs in all namespaces by turns, ``rate`` a second or as fast as it goes; returns their names."""
        places = itertools.cycle(namespaces or self.namespaces)
        batch = next(self._numbers)
        names = [f"run-{batch}-{number}" for number in range(count)]
        begin = asyncio.get_running_loop().time()

        async def make(item: tuple[int, str]) -> None:
            number, name = item
            if rate is not None:
                await asyncio.sleep(begin + number / rate - asyncio.get_running_loop().time())
            await self.client.call("POST", RUNS.format(next(places)), build_run(name, nodes))

        await run_all(enumerate(names), make, _AT_ONCE)
        return names

    async def clear(self, namespace: str) -> None:
        """Deletes the runs of a namespace, and what was made of them, at once: no kubelet ends the pods."""
        for path in (RUNS, JOBS, PODS):
            await self.client.call(
                "DELETE", f"{path.format(namespace)}?propagationPolicy=Background&gracePeriodSeconds=0"
            )

    async def wait_calls(self, mark: int, what: str, names: Sequence[str], is_it: Callable[[Call], bool]) -> None:
        """Waits until the audit log has a call of the operator for which ``is_it``, for each of the runs ``names``.

        Raises:
            BenchError: some are missing for long.
        """
        missing, deadline = set(names), asyncio.get_running_loop().time() + _BATCH_SECONDS
        seen = mark
        while missing:
            self.audit.read()
            new, seen = self.audit.calls[seen:], len(self.audit.calls)
            missing -= {call.run for call in new if call.user == OPERATOR and is_it(call)}
            if asyncio.get_running_loop().time() > deadline:
                raise BenchError(f"{what}: {len(missing)} of {len(names)} runs are missing, such as {min(missing)}")
            await asyncio.sleep(0.1 if missing else 0)

    async def wait_for_status(self, name: str, what: str, is_it: Callable[[Raw], object]) -> None:
        """Waits until the status of the run ``name`` is one for which ``is_it``.

        Raises:
            BenchError: it is not for long.
        """
        deadline = asyncio.get_running_loop().time() + _BATCH_SECONDS
        while not is_it(status := (await self.fetch(name)).get("status") or {}):
            if asyncio.get_running_loop().time() > deadline:
                raise BenchError(f"{what}: the status of {name} is {status}")
            await asyncio.sleep(0.1)

    async def fetch(self, name: str) -> Raw:
        """The run ``name``, in whatever namespace it is."""
        path = f"/apis/lorafinetune.io/v1alpha1/lorafinetunes?fieldSelector=metadata.name={name}"
        (found,) = (await self.client.call("GET", path))["items"]
        return dict(found)


@asynccontextmanager
async def make_bench(plane: ControlPlane, size: Size) -> AsyncIterator[Bench]:
    """A bench on ``plane``, prepared."""
    async with Client(access_to(plane)) as client:
        bench = Bench(plane, client, size)
        with closing(bench.audit):
            await bench.prepare()
            yield bench


async def create_role(client: Client) -> None:
    """Gives the user ``OPERATOR`` the operator's rights, in all namespaces."""
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    rules = [{"apiGroups": [rule.group], "resources": rule.resources, "verbs": rule.verbs} for rule in RBAC]
    await client.call("POST", f"{rbac}/clusterroles", {"metadata": {"name": OPERATOR}, "rules": rules})
    group = "rbac.authorization.k8s.io"
    binding = {
        "metadata": {"name": OPERATOR},
        "roleRef": {"kind": "ClusterRole", "name": OPERATOR, "apiGroup": group},
        "subjects": [{"kind": "User", "name": OPERATOR, "apiGroup": group}],
    }
    await client.call("POST", f"{rbac}/clusterrolebindings", binding)


def is_created(call: Call) -> bool:
    """Whether a call creates a run."""
    return call.verb == "create" and call.resource == "lorafinetunes"


def is_launched(call: Call) -> bool:
    """Whether a call ends the launch of a run."""
    return call.resource == "lorafinetunes/status" and call.code == 200


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)

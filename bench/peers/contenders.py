"""The operator and its peers, each as it is shipped, as processes on a control plane."""

import asyncio
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from bench.peers.manifests import (
    build_config,
    build_rights,
    build_train_job,
    build_webhooks,
    read_selectors,
)
from bench.scale.audit import OPERATOR, RUN_KIND
from bench.scale.bench import create_role
from bench.scale.client import RUNS, BenchError, Client
from bench.scale.process import OperatorProcess, Usage, usage
from bench.scale.residents import build_run
from devcluster import ControlPlane, binaries
from devcluster.ports import PortLease
from tests.support.install import install_crds

Raw = dict[str, Any]
Usages = Callable[[], list[Usage]]
"""What each process of a contender has used so far."""

_PATIENCE = 120.0


class Contender(Protocol):
    """One that makes Jobs of runs."""

    @property
    def title(self) -> str:
        """What it is called."""

    @property
    def users(self) -> Sequence[str]:
        """Who it is for the API server."""

    @property
    def kind(self) -> str:
        """Resource of its runs."""

    @property
    def path(self) -> str:
        """Where its runs are created, with a place for the namespace."""

    def build(self, name: str) -> Raw:
        """A run of two nodes."""

    def run_of(self, job: str) -> str:
        """Name of the run that a Job was made for."""

    def running(self, plane: ControlPlane, client: Client) -> AbstractAsyncContextManager[Usages]:
        """Installs and starts it, and waits until it serves."""


class Ours:
    """This operator, without preflights: the others have none."""

    title = "lora-operator"
    users = (OPERATOR,)
    kind = RUN_KIND
    path = RUNS

    def build(self, name: str) -> Raw:
        """A LoRAFineTune."""
        return build_run(name)

    def run_of(self, job: str) -> str:
        """Jobs are named after run and attempt."""
        return job.rpartition("-")[0]

    @asynccontextmanager
    async def running(self, plane: ControlPlane, client: Client) -> AsyncIterator[Usages]:
        """The operator as it runs in its container."""
        await asyncio.to_thread(install_crds, plane)
        await create_role(client)
        kubeconfig = plane.write_kubeconfig(OPERATOR, OPERATOR)
        with OperatorProcess(kubeconfig, plane.logs / "operator.log", rest_seconds=1.0) as operator:
            await operator.settle(0)
            yield lambda: [operator.usage()]


@dataclass(frozen=True)
class Peer:
    """A controller from a Go module. Paths are below the module's folder; ``certificates`` is a key of its config."""

    name: str
    module: str
    config: str
    certificates: str
    crds: str
    roles: tuple[str, ...]
    webhooks: str
    patches: tuple[str, ...] = ()
    flags: tuple[str, ...] = ("--zap-log-level=2",)


JOBSET = Peer(
    name="jobset",
    module="sigs.k8s.io/jobset",
    config="config/components/manager/controller_manager_config.yaml",
    certificates="internalCertManagement",
    crds="config/components/crd/bases",
    roles=("config/components/rbac/role.yaml", "config/components/rbac/leader_election_role.yaml"),
    webhooks="config/components/webhook/manifests.yaml",
    patches=(
        "config/components/webhook/patches/mutating-patch.yaml",
        "config/components/webhook/patches/validating-patch.yaml",
    ),
)
TRAINER = Peer(
    name="kubeflow-trainer",
    module="github.com/kubeflow/trainer/v2",
    config="manifests/base/manager/controller_manager_config.yaml",
    certificates="certManagement",
    crds="manifests/base/crds",
    roles=("manifests/base/rbac/role.yaml",),
    webhooks="manifests/base/webhook/manifests.yaml",
)
RUNTIME_FILE = "manifests/base/runtimes/torch_distributed.yaml"


class Kubeflow:
    """Kubeflow Trainer, which makes a JobSet of a TrainJob, and JobSet, which makes Jobs of that."""

    title = "Kubeflow Trainer v2.3.0 + JobSet v0.12.0"
    users = (TRAINER.name, JOBSET.name)
    kind = "trainjobs"
    path = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{}/trainjobs"

    def build(self, name: str) -> Raw:
        """A TrainJob."""
        return build_train_job(name)

    def run_of(self, job: str) -> str:
        """Jobs are named after TrainJob, replicated Job and number."""
        return job.rsplit("-", 2)[0]

    @asynccontextmanager
    async def running(self, plane: ControlPlane, client: Client) -> AsyncIterator[Usages]:
        """Both controllers, with their CRDs, rights and webhooks."""
        with ExitStack() as stack:
            processes = []
            for peer in (JOBSET, TRAINER):
                source = await asyncio.to_thread(binaries.find_source, "peers", peer.module)
                await asyncio.to_thread(_install, plane, peer, source)
                process = stack.enter_context(_run(plane, peer, source))
                await process.wait_until_ready()
                await asyncio.to_thread(process.install_webhooks, plane, source)
                processes.append(process)
            source = await asyncio.to_thread(binaries.find_source, "peers", TRAINER.module)
            await asyncio.to_thread(_apply, plane, [*_read(source / RUNTIME_FILE)])
            yield lambda: [usage(process.pid) for process in processes]


class PeerProcess:
    """A peer that runs."""

    def __init__(self, peer: Peer, pid: int, ports: dict[str, int], ended: Callable[[], int | None], log: Path) -> None:
        self._peer = peer
        self._ports = ports
        self._ended = ended
        self._log = log
        self.pid = pid

    async def wait_until_ready(self) -> None:
        """Waits until its webhooks are served, which is when it calls itself ready.

        Raises:
            BenchError: it does not for long, or has ended.
        """
        deadline = time.monotonic() + _PATIENCE
        while not await asyncio.to_thread(self._answers):
            if self._ended() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self._peer.name} does not get ready: {self._log.read_text()[-2000:]}")
            await asyncio.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports['health']}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False

    def install_webhooks(self, plane: ControlPlane, source: Path) -> None:
        """Has the API server call it."""
        patches = [yaml.safe_load((source / path).read_text()) for path in self._peer.patches]
        shipped = _read(source / self._peer.webhooks)
        authority, port = plane.ca.read_bytes(), self._ports["webhook"]
        _apply(plane, build_webhooks(self._peer.name, shipped, port, authority, read_selectors(patches)))


def _install(plane: ControlPlane, peer: Peer, source: Path) -> None:
    plane.kubectl("apply", "--server-side", *(f"--filename={path}" for path in _crds(source / peer.crds)))
    roles = [role for path in peer.roles for role in _read(source / path)]
    namespace: Raw = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"{peer.name}-system"}}
    _apply(plane, [namespace, *build_rights(peer.name, roles)])
    for path in _crds(source / peer.crds):
        (crd,) = _read(path)
        plane.kubectl("wait", "--for=create", f"customresourcedefinition/{crd['metadata']['name']}", "--timeout=30s")
        condition = "--for=jsonpath={.status.conditions[?(@.type=='Established')].status}=True"
        plane.kubectl("wait", condition, f"customresourcedefinition/{crd['metadata']['name']}", "--timeout=30s")


def _crds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.yaml") if path.name != "kustomization.yaml")


def _read(path: Path) -> list[Raw]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _apply(plane: ControlPlane, objects: Sequence[Raw]) -> None:
    plane.kubectl("apply", "--server-side", "--filename=-", input=yaml.safe_dump_all(objects))


@contextmanager
def _run(plane: ControlPlane, peer: Peer, source: Path) -> Iterator[PeerProcess]:
    """The process, with certificates of the control plane where it looks for its own."""
    leases = {name: PortLease() for name in ("health", "metrics", "webhook")}
    ports = {name: lease.port for name, lease in leases.items()}
    home = plane.directory / peer.name
    serving = home / "k8s-webhook-server" / "serving-certs"
    serving.mkdir(parents=True)
    pair = plane.files.authority.issue(f"{peer.name}-webhook", peer.name, hosts=["127.0.0.1"])
    (serving / "tls.crt").write_bytes(pair.certificate.read_bytes())
    (serving / "tls.key").write_bytes(pair.key.read_bytes())
    (shipped,) = _read(source / peer.config)
    config = home / "config.yaml"
    config.write_text(yaml.safe_dump(build_config(shipped, ports, f"{peer.name}-system", peer.certificates)))
    kubeconfig = plane.write_kubeconfig(peer.name, peer.name)
    program = binaries.ensure(["peers"])[peer.name]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "TMPDIR": str(home)}
    log = plane.logs / f"{peer.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, f"--config={config}", *peer.flags], env=environment, stdout=output, stderr=output
        )
        try:
            yield PeerProcess(peer, process.pid, ports, process.poll, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                process.wait()
                for lease in leases.values():
                    lease.release()


CONTENDERS: tuple[Contender, ...] = (Ours(), Kubeflow())

"""The handle of a cluster: where it is, what is in it, and how to break it for a test."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devcluster import binaries, namespaces, store
from devcluster.apiclient import run_kubectl
from devcluster.node import Node
from devcluster.paths import cache, file_lock
from devcluster.progress import DevclusterError, wait_for
from devcluster.supervision import Supervision

_READY_SECONDS = 60


def home(name: str) -> Path:
    """Return the folder of the cluster ``name``."""
    return cache() / "clusters" / name


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    ``s3_endpoint`` is reached from pods, ``s3_endpoint_host`` from this machine; both accept
    the one key pair, and ``bucket`` exists. ``external`` is true for the cluster of
    ``$KUBECONFIG``, which is only used: never started, broken or ended from here.
    """

    name: str
    kubeconfig: Path
    node_ip: str
    s3_endpoint: str
    s3_endpoint_host: str
    s3_access_key: str
    s3_secret_key: str
    bucket: str
    directory: Path
    nodes: tuple[str, ...] = ()
    external: bool = False

    def kubectl(self, *args: str, input: str | None = None, timeout: float = 60) -> str:  # noqa: A002 as subprocess.run
        """Run kubectl as an administrator; return what it prints, or raise with its message."""
        kubectl = binaries.ensure(["control-plane"])["kubectl"]
        return run_kubectl(kubectl, self.kubeconfig, *args, input=input, timeout=timeout)

    def down(self) -> None:
        """End the cluster and all that belongs to it; the images stay for the next time."""
        self._own()
        with file_lock(home(self.name) / "lock"):
            clean(self.name)

    def status(self) -> dict[str, str]:
        """Return a word on each part and node: "running" or "Ready", or what is wrong."""
        parts = {} if self.external else self.parts()
        try:
            return parts | self.readiness()
        except DevclusterError as error:
            return parts | {"nodes": str(error)}

    def parts(self) -> dict[str, str]:
        """Return "running", or how it ended, for each process."""
        with self.processes() as processes:
            return {
                name: "running" if child["exit"] is None else f"ended with exit code {child['exit']}"
                for name, child in processes.children().items()
            }

    def readiness(self) -> dict[str, str]:
        """Return "Ready", or why not, for each node, as the API server has it."""
        listing = json.loads(self.kubectl("get", "nodes", "--output=json", timeout=10))
        return {node["metadata"]["name"]: _readiness(node) for node in listing["items"]}

    def processes(self) -> Supervision:
        """Connect to the cluster's supervisor; close it after use (``with``)."""
        self._own()
        try:
            return namespaces.connect(self.directory)
        except OSError:
            raise DevclusterError(f"the cluster {self.name} does not run") from None

    def pids(self) -> list[int]:
        """Return the pids of the launcher and the init, as this machine counts."""
        return namespaces.find_processes(self.directory)

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` in the cluster's namespaces."""
        self._own()
        init = namespaces.find_init(self.directory)
        if init is None:
            raise DevclusterError(f"the cluster {self.name} does not run")
        return namespaces.inside(init, argv)

    def node(self, name: str) -> Node:
        """Return the paths and names of one node."""
        self._own()
        return make_nodes(self.name, len(self.nodes))[self.nodes.index(name)]

    # What tests break. All wait until it is done.

    def kill_kubelet(self, node: str) -> None:
        """Kill -9 the kubelet; its pods run on, and the node turns NotReady in about 45 s."""
        self._stop(self.node(node).kubelet)

    def start_kubelet(self, node: str) -> None:
        """Start a kubelet that was killed, and wait until the node is Ready."""
        self._start(self.node(node).kubelet)
        self.wait_node(node)

    def kill_node(self, node: str) -> None:
        """Kill -9 the kubelet, containerd and every container of a node: as if power was lost."""
        broken = self.node(node)
        self._stop(broken.kubelet)
        self._stop(broken.containerd)

        def emptied() -> bool:
            members = namespaces.cgroup_processes(broken.cgroup)
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return not members

        wait_for(f"the containers of {node} to end", emptied, 30)

    def start_node(self, node: str) -> None:
        """Start a node that was killed, and wait until it is Ready."""
        self._start(self.node(node).containerd)
        self.start_kubelet(node)

    def kill_api_server(self) -> None:
        """Kill -9 the API server."""
        self._stop("kube-apiserver")

    def start_api_server(self) -> None:
        """Start the API server again, on the same address and data, and wait until it is ready."""
        self._start("kube-apiserver")
        wait_for("the API server", self._answers, _READY_SECONDS, log=self.directory / "logs" / "kube-apiserver.log")

    def wait_node(self, node: str) -> None:
        """Wait until the kubelet of a node has reported anew, and the node is Ready."""
        since = _renewed(self, node)
        with self.processes() as processes:
            processes.wait_until_up(
                self.node(node).kubelet, lambda: self._ready_after(node, since), _READY_SECONDS, restart=True
            )

    def _ready_after(self, node: str, since: str) -> bool:
        try:
            item = json.loads(self.kubectl("get", "node", node, "--output=json"))
            return _readiness(item) == "Ready" and _renewed(self, node) != since
        except DevclusterError:
            return False

    def _answers(self) -> bool:
        try:
            return self.kubectl("get", "--raw=/readyz") == "ok"
        except DevclusterError:
            return False

    def _stop(self, process: str) -> None:
        with self.processes() as processes:
            processes.stop(process, kill=True)

    def _start(self, process: str) -> None:
        with self.processes() as processes:
            processes.start_again(process)

    def _own(self) -> None:
        if self.external:
            raise DevclusterError("this is the cluster of $KUBECONFIG, which was not started here and is left as it is")

    def save(self) -> None:
        """Write the handle down, for other processes to find."""
        fields = asdict(self) | {"kubeconfig": str(self.kubeconfig), "directory": str(self.directory)}
        path = self.directory / "cluster.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(fields, indent=2))


def _readiness(node: dict[str, Any]) -> str:
    conditions = {condition["type"]: condition for condition in node["status"].get("conditions", [])}
    ready = conditions.get("Ready", {"status": "Unknown", "message": "its kubelet has not reported"})
    return "Ready" if ready["status"] == "True" else f"NotReady: {ready['message']}"


def _renewed(cluster: Cluster, node: str) -> str:
    """Return when the kubelet of a node last said that it lives; "" when it never did."""
    lease = (
        "get",
        "lease",
        node,
        "--namespace=kube-node-lease",
        "--ignore-not-found",
        "--output=jsonpath={.spec.renewTime}",
    )
    return cluster.kubectl(*lease)


def make_nodes(name: str, count: int) -> list[Node]:
    """Return the nodes of a cluster."""
    base = home(name)
    return [Node(name, index, base / "run", base / "containerd" / f"node-{'ab'[index]}") for index in range(count)]


def find(name: str) -> Cluster | None:
    """Return the handle of the cluster ``name`` where it is up, in whatever health."""
    directory = home(name) / "run"
    try:
        fields = json.loads((directory / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    if not namespaces.find_processes(directory):
        return None
    paths = {"kubeconfig": Path(fields["kubeconfig"]), "directory": Path(fields["directory"])}
    return Cluster(**(fields | paths | {"nodes": tuple(fields["nodes"])}))


def clean(name: str) -> None:
    """End what there is of the cluster ``name``, dead or alive. The caller holds its lock."""
    directory = home(name) / "run"
    namespaces.destroy(directory, [node.cgroup for node in make_nodes(name, 2)])
    store.remove_sockets(directory)
    shutil.rmtree(directory, ignore_errors=True)

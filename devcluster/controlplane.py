"""A control plane for tests: etcd, the API server and, where asked, the controllers.

It listens on free ports of 127.0.0.1, is ready in a few seconds, and several run side by
side. It has no kubelet: pods are made (by the controllers) but never start, so a test
writes their status by hand.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devcluster import binaries
from devcluster.apiclient import ApiClient
from devcluster.components import (
    ControlPlaneFiles,
    apiserver_service,
    controller_manager_service,
    etcd_service,
)
from devcluster.kubeconfig import write_kubeconfig
from devcluster.ports import PortLease
from devcluster.supervision import LocalSupervisor

_READY_SECONDS = 60


class ControlPlane:
    """A running control plane; made by :func:`control_plane`.

    ``kubeconfig`` is that of an administrator, ``url`` and ``ca`` are for own clients,
    ``etcd_url`` with the pair ``files.etcd_client`` is for those of etcd, and ``logs`` holds
    one file for each process. Certificates of ``files.authority.issue(...)`` log in as any
    user or group.
    """

    def __init__(
        self, directory: Path, supervisor: LocalSupervisor, *, controller_manager: bool, audit_log: bool
    ) -> None:
        self._binaries = binaries.ensure_control_plane()
        self._supervisor = supervisor
        self._processes = supervisor.processes
        self._leases = [PortLease() for _ in range(4)]
        port, etcd_port, peer_port, manager_port = (lease.port for lease in self._leases)
        self.directory = directory
        self.logs = self._processes.logs
        self.url = f"https://127.0.0.1:{port}"
        self.etcd_url = f"https://127.0.0.1:{etcd_port}"
        self.files = ControlPlaneFiles.create(directory, [])
        self.ca = self.files.authority.certificate
        self.kubeconfig = self.write_kubeconfig("admin", "devcluster-admin", ["system:masters"])
        self._client = ApiClient(self.url, self.ca, self.files.admin, self._binaries["kubectl"], self.kubeconfig)
        self._etcd = etcd_service(self._binaries["etcd"], self.files, etcd_port, peer_port)
        self._apiserver = apiserver_service(
            self._binaries["kube-apiserver"],
            self.files,
            port=port,
            etcd_port=etcd_port,
            service_accounts=controller_manager,
            audit=audit_log,
        )
        self._processes.start(self._etcd)
        self.start_api_server()
        if controller_manager:
            user = "system:kube-controller-manager"
            kubeconfig = self.write_kubeconfig("controller-manager", user)
            self._manager = controller_manager_service(
                self._binaries["kube-controller-manager"], self.files, kubeconfig, manager_port
            )
            self._processes.start(self._manager)
            # The first thing that the controllers do for others to see.
            self._processes.wait_until_up(
                self._manager.name,
                lambda: self._client.answers("/api/v1/namespaces/default/serviceaccounts/default"),
                _READY_SECONDS,
            )

    def write_kubeconfig(self, name: str, user: str, groups: list[str] | None = None) -> Path:
        """Issue a certificate for ``user`` in ``groups``; return a kubeconfig that uses it.

        RBAC decides what that user may do; a test that checks rights binds roles to it.
        """
        pair = self.files.authority.issue(name, user, groups or [])
        return write_kubeconfig(
            self.directory / f"{name}.kubeconfig",
            cluster="devcluster",
            server=self.url,
            authority=self.ca,
            user=name,
            pair=pair,
        )

    def kubectl(self, *args: str, input: str | None = None, timeout: float = 60) -> str:  # noqa: A002 - as subprocess.run has it
        """Run kubectl as the administrator; return what it prints, or raise with its message."""
        return self._client.kubectl(*args, input=input, timeout=timeout)

    def start_api_server(self) -> None:
        """Start the API server (again, on the same port and data) and wait until it is ready."""
        self._processes.start(self._apiserver)
        self._processes.wait_until_up(self._apiserver.name, self._client.ready, _READY_SECONDS)

    def kill_api_server(self) -> None:
        """Kill -9 the API server and wait for its end."""
        self._processes.stop(self._apiserver.name, kill=True)

    def start_etcd(self) -> None:
        """Start etcd (again) and wait until the API server, if it runs, is ready."""
        self._processes.start(self._etcd)
        if self._processes.children()[self._apiserver.name]["exit"] is None:
            self._processes.wait_until_up(self._apiserver.name, self._client.ready, _READY_SECONDS)

    def kill_etcd(self) -> None:
        """Kill -9 etcd and wait for its end."""
        self._processes.stop(self._etcd.name, kill=True)

    def stop_controller_manager(self) -> None:
        """Kill -9 the controllers."""
        self._processes.stop(self._manager.name, kill=True)

    def start_controller_manager(self) -> None:
        """Start the controllers again."""
        self._processes.start(self._manager)

    def pids(self) -> dict[str, int]:
        """Return the pid of every process that runs, by name."""
        children = self._processes.children()
        return {name: child["pid"] for name, child in children.items() if child["exit"] is None and child["pid"]}

    def audit_entries(self, user_agent: str = "") -> list[dict[str, Any]]:
        """Return the requests so far whose user agent contains ``user_agent``, oldest first.

        Each is an audit.k8s.io/v1 Event (verb, requestURI, userAgent, objectRef, user,
        responseStatus, requestReceivedTimestamp). Needs ``audit_log=True``. A watch is
        written when it ends, and any other request before it is answered; one that is
        being written is left out.
        """
        *lines, _unfinished = self.files.audit_log.read_text(encoding="utf-8").split("\n")
        entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [entry for entry in entries if user_agent in entry.get("userAgent", "")]

    def end(self) -> None:
        """End every process."""
        self._supervisor.end()
        for lease in self._leases:
            lease.release()


@contextmanager
def control_plane(
    directory: Path | None = None, *, controller_manager: bool = False, audit_log: bool = False
) -> Iterator[ControlPlane]:
    """Run a control plane for the length of a ``with`` block.

    Data and logs go to ``directory``, or to a temporary one that is removed. Whatever
    happens to this process (kill -9 included), the processes end with it.
    """
    binaries.ensure_control_plane()
    temporary = None if directory else Path(tempfile.mkdtemp(prefix="devcluster-"))
    where = directory or temporary
    assert where is not None
    where.mkdir(parents=True, exist_ok=True)
    supervisor = LocalSupervisor(where / "logs", remove=temporary)
    try:
        running = ControlPlane(where, supervisor, controller_manager=controller_manager, audit_log=audit_log)
    except BaseException:
        supervisor.end()
        raise
    try:
        yield running
    finally:
        running.end()

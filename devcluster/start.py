"""Start a cluster: from nothing to a Ready node."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

from devcluster import binaries, components, dns, namespaces, policies, preflight, store
from devcluster import node as nodes_module
from devcluster.apiclient import ApiClient
from devcluster.busybox import image_archive
from devcluster.cluster import Cluster, clean, find, home, make_nodes
from devcluster.components import ControlPlaneFiles
from devcluster.external import external_cluster, is_external
from devcluster.kubeconfig import write_kubeconfig
from devcluster.node import BUSYBOX_IMAGE, Node
from devcluster.paths import cache, file_lock
from devcluster.progress import DevclusterError, say
from devcluster.supervision import Service

DEFAULT_NAME = "dev"
API_PORT = 6443
_READY_SECONDS = 60


def up(name: str = DEFAULT_NAME, nodes: int = 1) -> Cluster:
    """Start the cluster ``name`` with one or two nodes, or return it where it is up and well.

    Where ``$KUBECONFIG`` names a cluster that was not started here, that one is returned
    and nothing is started. What an earlier start left half dead is cleaned away first.
    """
    other = external_cluster()
    if other is not None:
        return other
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", name):
        raise DevclusterError(f"{name!r} is no name for a cluster: use up to 32 of a-z, 0-9 and -")
    if nodes not in (1, 2):
        raise DevclusterError(f"a cluster has 1 or 2 nodes, not {nodes}")
    preflight.check_cluster(home(name))
    weed = store.find_binary()
    programs = binaries.ensure(["control-plane", "node"])
    with file_lock(home(name) / "lock", f"waiting for another start or end of the cluster {name}"):
        running = find(name)
        if running is not None and _healthy(running):
            if len(running.nodes) != nodes:
                raise DevclusterError(
                    f"the cluster {name} is up with {len(running.nodes)} node(s): end it first (down)"
                )
            return running
        clean(name)
        try:
            return _Start(name, nodes, programs, weed).run()
        except BaseException:
            _keep_logs(name)
            clean(name)
            raise


def down(name: str = DEFAULT_NAME) -> None:
    """End the cluster ``name``, alive or half dead; a cluster of ``$KUBECONFIG`` is left as it is."""
    if is_external():
        say("KUBECONFIG names a cluster that was not started here: nothing to end")
        return
    preflight.require_root()
    with file_lock(home(name) / "lock", f"waiting for another start or end of the cluster {name}"):
        clean(name)


def _healthy(cluster: Cluster) -> bool:
    try:
        # The processes first: an API server without etcd answers late.
        parts = cluster.parts()
        # Of an older checkout, a cluster that enforces no NetworkPolicy is of no use.
        return (
            policies.NAME in parts
            and all(word == "running" for word in parts.values())
            and all(word == "Ready" for word in cluster.readiness().values())
        )
    except DevclusterError:
        return False


def _keep_logs(name: str) -> None:
    """Move the logs out of what is about to be cleaned away."""
    logs, kept = home(name) / "run" / "logs", home(name) / "failed-logs"
    if logs.exists():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept)
        say(f"the logs of the failed start are kept in {kept}")


class _Start:
    """One start of one cluster; each step is a method."""

    def __init__(self, name: str, nodes: int, programs: dict[str, Path], weed: Path) -> None:
        self.name = name
        self.programs = programs
        self.weed = weed
        self.nodes = make_nodes(name, nodes)
        self.directory = home(name) / "run"
        self.directory.mkdir(parents=True, mode=0o700)
        self.credentials = store.Credentials.generate()

    def run(self) -> Cluster:
        self.create_namespaces()
        self.files = ControlPlaneFiles.create(self.directory, [self.ip])
        self.kubeconfig = self.issue("admin", "devcluster-admin", ["system:masters"])
        self.client = ApiClient(
            self.server, self.files.authority.certificate, self.files.admin, self.programs["kubectl"], self.kubeconfig
        )
        with namespaces.connect(self.directory) as self.processes:
            self.start_storage_and_api()
            self.start_containerd()
            self.wait_api()
            self.start_controllers()
            self.start_kubelets()
            self.wait_all()
        cluster = self.handle()
        cluster.save()
        return cluster

    def create_namespaces(self) -> None:
        # The choice of a network is the only thing that clusters share.
        with file_lock(cache() / "clusters" / ".network.lock"):
            self.network = namespaces.choose_network(namespaces.networks_in_use())
            self.init = namespaces.create(self.directory, self.network)
        self.ip = self.network.node_ip
        self.server = f"https://{self.ip}:{API_PORT}"
        for node in self.nodes:
            namespaces.create_cgroup(node.cgroup)

    def issue(self, name: str, user: str, groups: list[str] | None = None) -> Path:
        return write_kubeconfig(
            self.directory / f"{name}.kubeconfig",
            cluster=f"devcluster-{self.name}",
            server=self.server,
            authority=self.files.authority.certificate,
            user=name,
            pair=self.files.authority.issue(name, user, groups or []),
        )

    def start(self, service: Service) -> None:
        self.processes.start(service)

    def start_storage_and_api(self) -> None:
        self.start(components.etcd_service(self.programs["etcd"], self.files, 2379, 2380))
        self.start(
            components.apiserver_service(
                self.programs["kube-apiserver"],
                self.files,
                port=API_PORT,
                etcd_port=2379,
                bind="0.0.0.0",
                advertise=self.ip,
            )
        )
        self.start(store.store_service(self.weed, self.directory, self.ip, self.credentials))

    def start_containerd(self) -> None:
        cni = preflight.cni_folder()
        assert cni is not None, "checked by preflight"
        for node in self.nodes:
            # Of pods of an earlier start; their images are elsewhere.
            shutil.rmtree(node.images / "io.containerd.grpc.v1.cri", ignore_errors=True)
            nodes_module.prepare_node(node, self.files.authority, self.server, self.ip, cni)
            self.start(nodes_module.containerd_service(node))
        for node in self.nodes:
            self.processes.wait_until_up(node.containerd, functools.partial(self.containerd_answers, node), 20)
            self.drop_old_containers(node)
            self.import_busybox(node)

    def containerd_answers(self, node: Node) -> bool:
        return self.ctr(node, "version").returncode == 0

    def ctr(self, node: Node, *args: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        argv = ["ctr", f"--address={node.socket}", "--namespace=k8s.io", *args]
        return subprocess.run(namespaces.inside(self.init, argv), input=data, capture_output=True, timeout=120)

    def drop_old_containers(self, node: Node) -> None:
        old = self.ctr(node, "containers", "list", "--quiet").stdout.decode().split()
        if old:
            self.ctr(node, "containers", "delete", *old)

    def import_busybox(self, node: Node) -> None:
        if self.ctr(node, "images", "list", "--quiet", f"name=={BUSYBOX_IMAGE}").stdout.strip():
            return
        path = shutil.which("busybox", path=preflight.SYSTEM_PATH)
        assert path is not None, "checked by preflight"
        done = self.ctr(node, "images", "import", "-", data=image_archive(BUSYBOX_IMAGE, Path(path)))
        if done.returncode != 0:
            raise DevclusterError(f"loading the sandbox image: {done.stderr.decode().strip()}")

    def wait_api(self) -> None:
        self.processes.wait_until_up("kube-apiserver", self.client.ready, _READY_SECONDS)
        say(f"API server ready at {self.server}")

    def start_controllers(self) -> None:
        manager = self.issue("controller-manager", "system:kube-controller-manager")
        self.start(
            components.controller_manager_service(self.programs["kube-controller-manager"], self.files, manager, 10257)
        )
        scheduler = self.issue("scheduler", "system:kube-scheduler")
        self.start(components.scheduler_service(self.programs["kube-scheduler"], self.files, scheduler, 10259))

    def start_kubelets(self) -> None:
        for node in self.nodes:
            self.start(nodes_module.kubelet_service(self.programs["kubelet"], node, self.ip))
        proxy = self.issue("kube-proxy", "system:kube-proxy")
        first = self.nodes[0]
        self.start(nodes_module.proxy_service(self.programs["kube-proxy"], self.directory, proxy, first, self.ip))
        items = [*dns.manifests(self.ip), *policies.manifests()]
        self.client.kubectl(
            "create", "--filename=-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        )
        resolver = self.issue("coredns", dns.USER)
        self.start(dns.dns_service(self.programs["coredns"], self.directory, resolver, self.ip))

    def wait_all(self) -> None:
        self.processes.wait_until_up("seaweedfs", lambda: store.answers(self.ip), _READY_SECONDS)
        say(f"S3 ready at http://{self.ip}:{store.PORT}")
        probe = namespaces.inside(self.init, ["busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8181/ready"])
        self.processes.wait_until_up(
            "coredns", lambda: subprocess.run(probe, capture_output=True).returncode == 0, _READY_SECONDS
        )
        for node in self.nodes:
            self.processes.wait_until_up(
                node.kubelet, functools.partial(self.node_ready, node), _READY_SECONDS, restart=True
            )
            say(f"{node.name} Ready")
        self.start_policies()
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self.processes.wait_until_up("kube-controller-manager", lambda: self.client.answers(account), _READY_SECONDS)

    def start_policies(self) -> None:
        # Not earlier: it ends where its node is not registered yet.
        reader = self.issue(policies.NAME, policies.USER)
        self.start(policies.policy_service(self.programs[policies.NAME], reader, self.nodes[0]))
        url = f"http://127.0.0.1:{policies.HEALTH_PORT}/healthz"
        probe = namespaces.inside(self.init, ["busybox", "wget", "-q", "-O", "-", url])
        self.processes.wait_until_up(
            policies.NAME, lambda: subprocess.run(probe, capture_output=True).returncode == 0, _READY_SECONDS
        )

    def node_ready(self, node: Node) -> bool:
        path = '--output=jsonpath={.status.conditions[?(@.type=="Ready")].status} {.spec.taints}'
        return self.client.kubectl("get", "node", node.name, "--ignore-not-found", path).strip() == "True"

    def handle(self) -> Cluster:
        endpoint = f"http://{self.ip}:{store.PORT}"
        return Cluster(
            name=self.name,
            kubeconfig=self.kubeconfig,
            node_ip=self.ip,
            s3_endpoint=endpoint,
            s3_endpoint_host=endpoint,
            s3_access_key=self.credentials.access_key,
            s3_secret_key=self.credentials.secret_key,
            bucket=store.BUCKET,
            directory=self.directory,
            nodes=tuple(node.name for node in self.nodes),
        )

"""A node: its containerd, its kubelet, its pod network; and kube-proxy for all nodes."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.components import DNS_IP, DOMAIN
from devcluster.kubeconfig import write_kubeconfig
from devcluster.pki import Authority
from devcluster.supervision import Service

POD_RANGE = "10.244.0.0/16"
# Also the image of the sandbox container of every pod; made here, see busybox.py.
BUSYBOX_IMAGE = "devcluster.local/busybox:1"


@dataclass(frozen=True)
class Node:
    """The names and paths of one node. Paths below /run are those inside the cluster."""

    cluster: str
    index: int
    directory: Path  # of this start of the cluster
    images: Path  # containerd's root, kept from start to start

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        return f"node-{'ab'[self.index]}"

    @property
    def cgroup(self) -> str:
        """The control group that all its pods are in: its own, also where another cache has a cluster of this name."""
        place = hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]
        return f"devcluster-{self.cluster}-{place}-{self.name}"

    @property
    def runtime(self) -> Path:
        """Its sockets and other state that ends with the cluster."""
        return Path("/run/devcluster") / self.name

    @property
    def socket(self) -> Path:
        """Where its containerd listens."""
        return self.runtime / "containerd.sock"

    @property
    def files(self) -> Path:
        """Its configuration, volumes and logs."""
        return self.directory / self.name

    @property
    def kubelet_port(self) -> int:
        """Where the API server reaches its kubelet."""
        return 10250 + 10 * self.index

    @property
    def health_port(self) -> int:
        """Where its kubelet says that it is well."""
        return 10248 + 10 * self.index

    @property
    def containerd(self) -> str:
        """The name of its containerd among the processes."""
        return f"containerd-{self.name}"

    @property
    def kubelet(self) -> str:
        """The name of its kubelet among the processes."""
        return f"kubelet-{self.name}"


def containerd_config(node: Node, cni: Path) -> str:
    """Return containerd's configuration (TOML); pure."""
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE every sandbox fails otherwise.
    return f"""\
version = 2
root = "{node.images}"
state = "{node.runtime}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
  address = "{node.socket}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{node.runtime}/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{BUSYBOX_IMAGE}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  max_container_log_line_size = 65536

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{cni}"
  conf_dir = "{node.files}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
"""


def cni_config(node: Node) -> dict[str, Any]:
    """Return the pod network: a cable from each pod to the node, which routes between them."""
    # Not a bridge: what crosses one passes iptables, and so Services, only with a kernel module.
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": f"10.244.{node.index}.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(node.runtime / "ipam"),
    }
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}]}


def kubelet_config(node: Node, authority: Path, address: str) -> dict[str, Any]:
    """Return the KubeletConfiguration; pure."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "port": node.kubelet_port,
        "healthzPort": node.health_port,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(node.files / "kubelet.crt"),
        "tlsPrivateKeyFile": str(node.files / "kubelet.key"),
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "clusterDNS": [DNS_IP],
        "clusterDomain": DOMAIN,
        "resolvConf": str(node.files / "resolv.conf"),
        "podLogsDir": str(node.files / "pod-logs"),
        "volumePluginDir": str(node.files / "volume-plugins"),
        # The disk is the machine's, and how full it is no reason to end pods or drop images.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
            "imagefs.inodesFree": "0%",
        },
    }


def prepare_node(node: Node, authority: Authority, server: str, address: str, cni: Path) -> None:
    """Write all the files of a node."""
    (node.files / "cni").mkdir(parents=True)
    node.images.mkdir(parents=True, exist_ok=True)
    (node.files / "containerd.toml").write_text(containerd_config(node, cni))
    (node.files / "cni" / "pods.conflist").write_text(json.dumps(cni_config(node), indent=2))
    (node.files / "kubelet.json").write_text(json.dumps(kubelet_config(node, authority.certificate, address), indent=2))
    (node.files / "resolv.conf").write_text("")
    serving = authority.issue(f"{node.name}-serving", node.name, hosts=[node.name, address])
    for source, target in ((serving.certificate, "kubelet.crt"), (serving.key, "kubelet.key")):
        (node.files / target).touch(mode=0o600)
        (node.files / target).write_bytes(source.read_bytes())
    write_kubeconfig(
        node.files / "kubelet.kubeconfig",
        cluster=node.cluster,
        server=server,
        authority=authority.certificate,
        user=node.name,
        pair=authority.issue(node.name, f"system:node:{node.name}", ["system:nodes"]),
    )


def containerd_service(node: Node) -> Service:
    """A containerd of the node's own."""
    return Service(node.containerd, ["containerd", f"--config={node.files / 'containerd.toml'}"])


def kubelet_service(binary: Path, node: Node, address: str) -> Service:
    """A kubelet that registers its node by itself."""
    return Service(
        node.kubelet,
        [
            binary,
            f"--config={node.files / 'kubelet.json'}",
            f"--kubeconfig={node.files / 'kubelet.kubeconfig'}",
            f"--root-dir={node.files / 'kubelet'}",
            f"--cert-dir={node.files}",
            f"--hostname-override={node.name}",
            f"--node-ip={address}",
        ],
    )


def proxy_service(binary: Path, directory: Path, kubeconfig: Path, node: Node, address: str) -> Service:
    """kube-proxy; one for all nodes, since they share one network namespace."""
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "bindAddress": address,
        "clusterCIDR": POD_RANGE,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "hostnameOverride": node.name,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "oomScoreAdj": 0,
        # These limits are the machine's, and read-only in a namespace.
        "conntrack": {"maxPerCore": 0, "min": 0},
    }
    path = directory / "kube-proxy.json"
    path.write_text(json.dumps(config, indent=2))
    return Service("kube-proxy", [binary, f"--config={path}"])

"""The versions that the development cluster is made of.

The Go modules in ``modules/`` pin every byte that is compiled (go.mod and go.sum);
this table says which package of which module becomes which binary.
"""

from dataclasses import dataclass
from pathlib import Path

MODULES = Path(__file__).resolve().parent / "modules"

KUBERNETES_VERSION = "v1.37.2"
GO_VERSION = (1, 26)  # the oldest Go that builds this Kubernetes
DEBIAN_SUITE = "bookworm"


@dataclass(frozen=True)
class Binary:
    """One program, built from ``package`` of the Go module ``modules/<module>``."""

    name: str
    module: str
    package: str
    group: str
    ldflags: str = "-s -w"


# Without this stamp the API server reports v0.0.0, which clients cannot parse.
_STAMP = f"-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}"


def _kubernetes(name: str, group: str) -> Binary:
    return Binary(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", group, _STAMP)


# In build order: what tests wait for comes first.
BINARIES: tuple[Binary, ...] = (
    Binary("etcd", "kubernetes", "go.etcd.io/etcd/server/v3", "control-plane"),
    _kubernetes("kube-apiserver", "control-plane"),
    _kubernetes("kubectl", "control-plane"),
    _kubernetes("kube-controller-manager", "control-plane"),
    _kubernetes("kube-scheduler", "node"),
    _kubernetes("kubelet", "node"),
    _kubernetes("kube-proxy", "node"),
    Binary("coredns", "coredns", ".", "node"),
    Binary("kube-router", "kube-router", "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router", "node"),
    Binary("helm", "helm", "helm.sh/helm/v4/cmd/helm", "tools"),
    Binary("kueue", "kueue", "sigs.k8s.io/kueue/cmd/kueue", "kueue"),
    Binary("jobset", "peers", "sigs.k8s.io/jobset", "peers"),
    Binary("kubeflow-trainer", "peers", "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager", "peers"),
)
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(binary.group for binary in BINARIES))
LAZY_GROUPS = ("kueue", "peers")  # built only where they are asked for by name

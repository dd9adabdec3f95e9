"""The versions that the development cluster is made of.

The Go modules in ``modules/`` pin every byte that is compiled (go.mod and go.sum);
this table says which package of which module becomes which binary.
"""

from dataclasses import dataclass
from pathlib import Path

MODULES = Path(__file__).resolve().parent / "modules"

KUBERNETES_VERSION = "v1.37.2"
OLDER_KUBERNETES = {"1.29": "v1.29.15", "1.33": "v1.33.13"}
"""Of which the control plane alone is built, for tests (``make test-versions``): the oldest that is supported, and one
between it and today's."""
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
    tags: str = ""


_NO_CLOUDS = "providerless"
"""Leaves out the drivers of clouds, which Kubernetes had up to 1.30, and which take minutes to compile."""

_ETCD = "go.etcd.io/etcd/server/v3"


def _kubernetes(name: str, group: str) -> Binary:
    return Binary(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", group, _stamp(KUBERNETES_VERSION))


def _stamp(version: str) -> str:
    """Without it the API server reports v0.0.0, which clients cannot parse."""
    return f"-s -w -X k8s.io/component-base/version.gitVersion={version}"


def _older(minor: str, version: str) -> tuple[Binary, ...]:
    """The control plane of an older Kubernetes: a module and a group of its own, under the same names."""
    module, command = older_group(minor), "k8s.io/kubernetes/cmd"
    return (
        Binary("etcd", module, _ETCD, module),
        *(
            Binary(name, module, f"{command}/{name}", module, _stamp(version), tags=_NO_CLOUDS)
            for name in ("kube-apiserver", "kubectl", "kube-controller-manager")
        ),
    )


def older_group(minor: str) -> str:
    """The group of binaries, and the module, of a version in ``OLDER_KUBERNETES``."""
    return f"kubernetes-{minor}"


# In build order: what tests wait for comes first.
BINARIES: tuple[Binary, ...] = (
    Binary("etcd", "kubernetes", _ETCD, "control-plane"),
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
    *(binary for minor, version in OLDER_KUBERNETES.items() for binary in _older(minor, version)),
)
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(binary.group for binary in BINARIES))
LAZY_GROUPS = ("kueue", "peers", *map(older_group, OLDER_KUBERNETES))  # built only where they are asked for by name

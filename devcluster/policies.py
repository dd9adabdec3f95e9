"""NetworkPolicies: kube-router's firewall as a process, which filters what enters and leaves each pod."""

from pathlib import Path
from typing import Any

from devcluster.components import SERVICE_RANGE
from devcluster.node import Node
from devcluster.supervision import Service

NAME = "kube-router"
USER = "system:kube-router"
HEALTH_PORT = 20244


def policy_service(binary: Path, kubeconfig: Path, node: Node) -> Service:
    """kube-router without its router and its proxy; one for all nodes.

    It guards the pods whose host has the address of its node, and the nodes share one.
    """
    return Service(
        NAME,
        [
            binary,
            "--run-firewall=true",
            "--run-router=false",
            "--run-service-proxy=false",
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={node.name}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--health-port={HEALTH_PORT}",
        ],
    )


def manifests() -> list[dict[str, Any]]:
    """Return what kube-router may read; pure."""
    core = ["endpoints", "namespaces", "nodes", "pods", "services"]
    rules: list[dict[str, Any]] = [
        {"apiGroups": [""], "resources": core, "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list", "watch"]},
    ]
    return [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": USER},
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": USER},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
        },
    ]

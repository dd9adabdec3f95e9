"""Cluster DNS: CoreDNS as a process beside the API server, behind the usual Service."""

from pathlib import Path
from typing import Any

from devcluster.components import DNS_IP, DOMAIN
from devcluster.supervision import Service

USER = "system:coredns"
_LABELS = {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"}


def corefile(kubeconfig: Path, address: str) -> str:
    """Return the configuration: the cluster's names, and a quick no to all others."""
    return f"""\
{DOMAIN}:53 in-addr.arpa:53 {{
    bind {address}
    errors
    ready 127.0.0.1:8181
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 1
    }}
}}
.:53 {{
    bind {address}
    errors
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def dns_service(binary: Path, directory: Path, kubeconfig: Path, address: str) -> Service:
    """CoreDNS, on the address that the Service leads to."""
    path = directory / "Corefile"
    path.write_text(corefile(kubeconfig, address))
    return Service("coredns", [binary, f"-conf={path}"])


def manifests(address: str) -> list[dict[str, Any]]:
    """Return what CoreDNS may read, and the Service that pods reach it by; pure."""
    namespace = "kube-system"
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    return [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": USER},
            "rules": [
                {"apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": USER},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": namespace, "labels": _LABELS},
            "spec": {
                "clusterIP": DNS_IP,
                "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in ports],
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns",
                "namespace": namespace,
                "labels": {
                    "kubernetes.io/service-name": "kube-dns",
                    "endpointslice.kubernetes.io/managed-by": "devcluster",
                },
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
            "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in ports],
        },
    ]

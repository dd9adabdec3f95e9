"""The control plane's commands: which flags etcd, the API server and the managers get.

Shared by the control plane of the tests and by the full cluster; pure.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.pki import Authority, Pair, create_signing_pair
from devcluster.supervision import Service

SERVICE_RANGE = "10.96.0.0/16"
KUBERNETES_SERVICE_IP = "10.96.0.1"
DNS_IP = "10.96.0.10"
DOMAIN = "cluster.local"
FRONT_PROXY = "front-proxy-client"
"""Name by which the API server calls servers of further APIs (APIService), such as Kueue's."""

AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata"}],
}


@dataclass(frozen=True)
class ControlPlaneFiles:
    """The files that the control plane's processes read, all below one directory."""

    directory: Path
    authority: Authority
    etcd_authority: Path
    etcd: Pair
    etcd_client: Pair
    server: Pair
    front_proxy_authority: Path
    front_proxy: Pair
    kubelet_client: Pair
    admin: Pair
    service_accounts: Pair

    @classmethod
    def create(cls, directory: Path, addresses: Sequence[str]) -> "ControlPlaneFiles":
        """Make both authorities and every pair; ``addresses`` go into the server's certificate."""
        pki = directory / "pki"
        authority = Authority(pki, "ca")
        # Of its own, so that no client of the API server can read etcd.
        etcd = Authority(pki, "etcd-ca")
        # Of its own too: whoever has one of its certificates may say on whose behalf it calls.
        front_proxy = Authority(pki, "front-proxy-ca")
        kubernetes = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{DOMAIN}"]
        return cls(
            directory=directory,
            authority=authority,
            etcd_authority=etcd.certificate,
            etcd=etcd.issue("etcd", "etcd", hosts=["localhost", "127.0.0.1"]),
            etcd_client=etcd.issue("etcd-client", "kube-apiserver"),
            server=authority.issue(
                "apiserver",
                "kube-apiserver",
                hosts=["localhost", "127.0.0.1", KUBERNETES_SERVICE_IP, *kubernetes, *addresses],
            ),
            front_proxy_authority=front_proxy.certificate,
            front_proxy=front_proxy.issue("front-proxy-client", FRONT_PROXY),
            kubelet_client=authority.issue(
                "apiserver-kubelet-client", "kube-apiserver-kubelet-client", ["system:masters"]
            ),
            admin=authority.issue("admin", "devcluster-admin", ["system:masters"]),
            service_accounts=create_signing_pair(pki, "service-accounts"),
        )

    @property
    def audit_log(self) -> Path:
        """The requests so far, one JSON object a line."""
        return self.directory / "audit.log"


def etcd_service(binary: Path, files: ControlPlaneFiles, port: int, peer_port: int) -> Service:
    """Etcd on 127.0.0.1, spoken to with client certificates only."""
    url, peer = f"https://127.0.0.1:{port}", f"https://127.0.0.1:{peer_port}"
    argv: list[str | Path] = [binary, "--name=devcluster", f"--data-dir={files.directory / 'etcd'}"]
    argv += [f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
    argv += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
    argv += [f"--initial-cluster=devcluster={peer}"]
    for prefix in ("", "peer-"):
        argv += [
            f"--{prefix}cert-file={files.etcd.certificate}",
            f"--{prefix}key-file={files.etcd.key}",
            f"--{prefix}client-cert-auth=true",
            f"--{prefix}trusted-ca-file={files.etcd_authority}",
        ]
    # The data need not outlive the machine, only a killed process: the page cache does.
    argv += ["--unsafe-no-fsync", "--log-level=warn"]
    return Service("etcd", argv)


def apiserver_service(
    binary: Path,
    files: ControlPlaneFiles,
    *,
    port: int,
    etcd_port: int,
    bind: str = "127.0.0.1",
    advertise: str | None = None,
    service_accounts: bool = True,
    audit: bool = False,
) -> Service:
    """kube-apiserver: TLS, Node and RBAC authorization, Pod Security and NodeRestriction.

    ``advertise`` is the address that pods reach it at; None where no pod runs.
    ``service_accounts`` is False where no controller would make the accounts that pods need.
    """
    accounts = files.service_accounts
    argv: list[str | Path] = [
        binary,
        f"--bind-address={bind}",
        f"--secure-port={port}",
        f"--cert-dir={files.directory / 'pki'}",
        f"--tls-cert-file={files.server.certificate}",
        f"--tls-private-key-file={files.server.key}",
        f"--client-ca-file={files.authority.certificate}",
        f"--etcd-servers=https://127.0.0.1:{etcd_port}",
        f"--etcd-cafile={files.etcd_authority}",
        f"--etcd-certfile={files.etcd_client.certificate}",
        f"--etcd-keyfile={files.etcd_client.key}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--service-account-key-file={accounts.certificate}",
        f"--service-account-signing-key-file={accounts.key}",
        f"--kubelet-certificate-authority={files.authority.certificate}",
        f"--kubelet-client-certificate={files.kubelet_client.certificate}",
        f"--kubelet-client-key={files.kubelet_client.key}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--proxy-client-cert-file={files.front_proxy.certificate}",
        f"--proxy-client-key-file={files.front_proxy.key}",
        f"--requestheader-client-ca-file={files.front_proxy_authority}",
        f"--requestheader-allowed-names={FRONT_PROXY}",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction,PodSecurity",
        "--allow-privileged=true",
        "--profiling=false",
    ]
    if not service_accounts:
        argv.append("--disable-admission-plugins=ServiceAccount")
    argv.append(f"--advertise-address={advertise}" if advertise else "--endpoint-reconciler-type=none")
    if audit:
        policy = files.directory / "audit-policy.json"
        policy.write_text(json.dumps(AUDIT_POLICY))
        argv += [f"--audit-policy-file={policy}", f"--audit-log-path={files.audit_log}", "--audit-log-mode=blocking"]
    return Service("kube-apiserver", argv)


def controller_manager_service(binary: Path, files: ControlPlaneFiles, kubeconfig: Path, port: int) -> Service:
    """kube-controller-manager, each controller with the rights of its own service account."""
    return Service(
        "kube-controller-manager",
        [
            binary,
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={files.directory / 'pki'}",
            f"--root-ca-file={files.authority.certificate}",
            f"--cluster-signing-cert-file={files.authority.certificate}",
            f"--cluster-signing-key-file={files.authority.key}",
            f"--service-account-private-key-file={files.service_accounts.key}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            # The default of 20 calls a second makes a burst of Jobs wait for this process.
            "--kube-api-qps=100",
            "--kube-api-burst=200",
            "--profiling=false",
        ],
    )


def scheduler_service(binary: Path, files: ControlPlaneFiles, kubeconfig: Path, port: int) -> Service:
    """Kube-scheduler."""
    return Service(
        "kube-scheduler",
        [
            binary,
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={files.directory / 'pki'}",
            "--leader-elect=false",
            "--profiling=false",
        ],
    )

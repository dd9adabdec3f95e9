"""Who may ask a control plane and a kubelet, and how they know each other."""

import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from devcluster import components, kubeconfig
from devcluster.pki import Authority


def test_certificates_are_trusted_for_their_hosts_only(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    pair = authority.issue("server", "server", hosts=["localhost", "127.0.0.1"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair.certificate, pair.key)

    def shake_hands(host: str) -> None:
        client = ssl.create_default_context(cafile=str(authority.certificate))
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(to_client, to_server, server_hostname=host),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        for end in ends * 2:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue

    shake_hands("localhost")
    shake_hands("127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands("elsewhere.test")
    assert pair.key.stat().st_mode & 0o077 == 0


def test_a_kubeconfig_is_for_its_owner_only_and_carries_the_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    path = kubeconfig.write_kubeconfig(
        tmp_path / "kubeconfig",
        cluster="c",
        server="https://127.0.0.1:1",
        authority=authority.certificate,
        user="u",
        pair=authority.issue("u", "u"),
    )
    document = json.loads(path.read_text())
    assert document["current-context"] == "c"
    assert set(document["clusters"][0]["cluster"]) == {"server", "certificate-authority-data"}
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        pytest.param(
            {}, ["--endpoint-reconciler-type=none"], ["--advertise-address", "--audit-log-path"], id="alone for tests"
        ),
        pytest.param({"advertise": "10.89.0.2"}, ["--advertise-address=10.89.0.2"], ["--endpoint-rec"], id="with pods"),
        pytest.param(
            {"service_accounts": False}, ["--disable-admission-plugins=ServiceAccount"], [], id="without controllers"
        ),
        pytest.param(
            {"audit": True}, ["--audit-log-mode=blocking"], ["--disable-admission"], id="with its calls recorded"
        ),
    ],
)
def test_the_api_server_is_always_secured(
    tmp_path: Path, options: dict[str, Any], present: list[str], absent: list[str]
) -> None:
    files = components.ControlPlaneFiles.create(tmp_path, ["10.89.0.2"])
    service = components.apiserver_service(Path("/bin/true"), files, port=1, etcd_port=2, **options)
    words = [str(word) for word in service.argv]
    secured = ["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction,PodSecurity"]
    for flag in [*present, *secured]:
        assert flag in words
    for flag in absent:
        assert not [word for word in words if word.startswith(flag)]

"""The parts of devcluster that need no process: tables of what goes in and what comes out."""

import gzip
import hashlib
import io
import json
import re
import ssl
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import busybox, cli, components, dns, kubeconfig, loading, namespaces, node, pins, preflight
from devcluster.baseimage import base_name
from devcluster.binaries import control_plane_group, module_key
from devcluster.building import check_tag, pip_settings
from devcluster.external import external_cluster
from devcluster.paths import REPOSITORY
from devcluster.pki import Authority
from devcluster.ports import PortLease
from devcluster.progress import DevclusterError, run_logged, tail, wait_for


@pytest.mark.parametrize(
    ("in_use", "number"),
    [
        pytest.param([], 0, id="the first network is taken where all are free"),
        pytest.param(["10.89.0.0/24"], 1, id="that of another cluster is passed by"),
        pytest.param(["10.89.0.0/24", "10.89.2.0/24"], 1, id="a gap is filled"),
        pytest.param(["10.89.0.0/17"], 128, id="a larger network of the machine is passed by"),
        pytest.param(["10.89.0.7"], 1, id="a route to one host counts"),
        pytest.param(["192.168.1.0/24", "172.17.0.0/16"], 0, id="other networks do not matter"),
    ],
)
def test_a_cluster_takes_a_network_that_nothing_uses(in_use: list[str], number: int) -> None:
    network = namespaces.choose_network(in_use)
    assert network.number == number
    assert network.host_ip == f"10.89.{number}.1"
    assert network.node_ip == f"10.89.{number}.2"


def test_no_network_left_is_said() -> None:
    with pytest.raises(DevclusterError, match=r"every network 10\.89\.0\.0/24 to 10\.89\.255\.0/24 is in use"):
        namespaces.choose_network(["10.0.0.0/8"])


def test_the_machines_own_settings_are_hidden_from_the_kubelet(tmp_path: Path) -> None:
    script = namespaces.setup_script(tmp_path)
    for name in namespaces.KUBELET_SYSCTLS:
        assert f"/proc/sys/{name}\n" in script
    assert script.startswith("set -e\n")


@pytest.mark.parametrize(
    ("diff_ids", "chain"),
    [
        pytest.param([], [], id="no layer"),
        pytest.param(["sha256:a"], ["sha256:a"], id="the lowest layer is its own chain"),
        pytest.param(
            ["sha256:a", "sha256:b"],
            ["sha256:a", f"sha256:{hashlib.sha256(b'sha256:a sha256:b').hexdigest()}"],
            id="an upper layer hashes the chain below and itself",
        ),
    ],
)
def test_chain_ids_follow_the_image_specification(diff_ids: list[str], chain: list[str]) -> None:
    assert loading.chain_ids(diff_ids) == chain


def read_archive(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {entry.name: archive.extractfile(entry) for entry in archive if entry.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def read_manifest(files: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    (described,) = json.loads(files["index.json"])["manifests"]
    return described, json.loads(files[f"blobs/sha256/{described['digest'].removeprefix('sha256:')}"])


def test_the_archive_of_a_linked_image_names_its_layers_and_holds_none() -> None:
    layers = (loading.Layer(Path("/a"), "sha256:aa", 10), loading.Layer(Path("/b"), "sha256:bb", 20))
    config = b'{"rootfs":{"diff_ids":["sha256:aa","sha256:bb"]}}'
    files = read_archive(loading.metadata_archive(loading.Contents(config, layers), "localhost/image:dev"))
    described, manifest = read_manifest(files)
    assert described["annotations"] == {"io.containerd.image.name": "localhost/image:dev"}
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(config).hexdigest()}"
    assert [(layer["digest"], layer["size"]) for layer in manifest["layers"]] == [("sha256:aa", 10), ("sha256:bb", 20)]
    assert len(files) == 4  # oci-layout, index, manifest and config


@pytest.mark.parametrize(
    ("mounts", "folder"),
    [
        pytest.param("mount -t bind /root/snapshots/1/fs /x -o rw,rbind", "/root/snapshots/1/fs", id="lowest layer"),
        pytest.param(
            "mount -t overlay overlay /x -o index=off,workdir=/s/2/work,upperdir=/s/2/fs,lowerdir=/s/1/fs",
            "/s/2/fs",
            id="layer on another",
        ),
    ],
)
def test_the_folder_of_a_snapshot_is_found(mounts: str, folder: str) -> None:
    assert loading.mounted_folder(mounts) == Path(folder)


def test_the_busybox_image_holds_the_program_and_a_name_for_each_applet(tmp_path: Path) -> None:
    program = tmp_path / "busybox"
    program.write_text("#!/bin/sh\necho sh\necho sleep\necho busybox\n")
    program.chmod(0o755)
    archive = busybox.image_archive("devcluster.local/busybox:1", program)
    assert archive == busybox.image_archive("devcluster.local/busybox:1", program)
    files = read_archive(archive)
    _, manifest = read_manifest(files)
    layer = gzip.decompress(files[f"blobs/sha256/{manifest['layers'][0]['digest'].removeprefix('sha256:')}"])
    with tarfile.open(fileobj=io.BytesIO(layer)) as opened:
        names = {entry.name: entry.linkname for entry in opened}
    assert names == {
        "bin": "",
        "etc": "",
        "tmp": "",
        "bin/busybox": "",
        "bin/sh": "busybox",
        "bin/sleep": "busybox",
    } | {"etc/passwd": ""}


@pytest.mark.parametrize("tag", ["localhost/trainer:dev", "devcluster.local/a/b:1", "registry:5000/x:y"])
def test_a_tag_with_a_domain_is_taken(tag: str) -> None:
    assert check_tag(tag) == tag


@pytest.mark.parametrize("tag", ["trainer", "trainer:dev", "library/trainer:dev", "localhost/trainer"])
def test_a_tag_that_tools_read_differently_is_refused(tag: str) -> None:
    with pytest.raises(DevclusterError, match="DOMAIN/NAME:TAG"):
        check_tag(tag)


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        pytest.param({}, [], id="nothing set"),
        pytest.param(
            {"PIP_INDEX_URL": "http://index.test/simple"}, ["index-url = http://index.test/simple"], id="index"
        ),
        pytest.param(
            {"PIP_FIND_LINKS": "/one /two"}, ["find-links = /one\n    /two"], id="a list is written on lines of its own"
        ),
        pytest.param({"PIP_DEFAULT_TIMEOUT": "60"}, ["timeout = 60"], id="a name that differs"),
    ],
)
def test_pip_in_a_build_is_told_what_pip_is_told_here(environment: dict[str, str], lines: list[str]) -> None:
    text = pip_settings(environment, "/cache")
    head = "[global]\ncache-dir = /cache\ndisable-pip-version-check = true\n"
    assert text == head + "".join(f"{line}\n" for line in lines)


def test_the_base_image_is_named_by_its_packages() -> None:
    assert base_name("bookworm", ["a", "b"]) == base_name("bookworm", ["b", "a"])
    assert base_name("bookworm", ["a"]) != base_name("bookworm", ["a", "b"])
    assert base_name("trixie", ["a"]) != base_name("bookworm", ["a"])


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "main.go"])
def test_a_change_of_any_source_is_another_build(tmp_path: Path, changed: str) -> None:
    for name in ("go.mod", "go.sum", "main.go"):
        (tmp_path / name).write_text("one")
    before = module_key(tmp_path, "go1.26.8", ["-s"])
    assert before == module_key(tmp_path, "go1.26.8", ["-s"])
    assert before != module_key(tmp_path, "go1.26.9", ["-s"])
    assert before != module_key(tmp_path, "go1.26.8", ["-w"])
    (tmp_path / changed).write_text("two")
    assert before != module_key(tmp_path, "go1.26.8", ["-s"])


def test_every_binary_is_pinned_by_a_module() -> None:
    for binary in pins.BINARIES:
        folder = pins.MODULES / binary.module
        assert (folder / "go.sum").stat().st_size > 0
        if binary.package != ".":
            assert binary.package in (folder / "go.mod").read_text()
    versions = {"kubernetes": pins.KUBERNETES_VERSION}
    versions |= {pins.older_group(minor): version for minor, version in pins.OLDER_KUBERNETES.items()}
    for module, version in versions.items():
        text = (pins.MODULES / module / "go.mod").read_text()
        assert f"k8s.io/kubernetes {version}" in text
        assert set(re.findall(r"=> k8s\.io/\S+ (v\S+)", text)) == {version.replace("v1.", "v0.")}


def test_an_older_control_plane_has_programs_of_its_own_under_the_same_names() -> None:
    today = {binary.name for binary in pins.BINARIES if binary.group == "control-plane"}
    for minor in pins.OLDER_KUBERNETES:
        older = [binary for binary in pins.BINARIES if binary.group == control_plane_group(minor)]
        assert {binary.name for binary in older} == today
        assert {binary.module for binary in older} == {pins.older_group(minor)}
    assert control_plane_group("") == control_plane_group("1.37") == "control-plane"
    with pytest.raises(DevclusterError, match=r"LORA_KUBERNETES is 1\.12, .* there are 1\.29, 1\.33, 1\.37"):
        control_plane_group("1.12")


def test_the_chart_takes_the_oldest_kubernetes_that_is_tested() -> None:
    chart = yaml.safe_load((REPOSITORY / "charts" / "lora-operator" / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={min(pins.OLDER_KUBERNETES)}-0"
    told = (REPOSITORY / "docs" / "install.md").read_text()
    for version in (*pins.OLDER_KUBERNETES.values(), pins.KUBERNETES_VERSION):
        assert version.removeprefix("v") in told


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


def make_node(index: int) -> node.Node:
    return node.Node("dev", index, Path("/cache/run"), Path(f"/cache/images-{index}"))


def test_two_nodes_share_nothing() -> None:
    first, second = make_node(0), make_node(1)
    for attribute in ("name", "cgroup", "runtime", "socket", "files", "images", "kubelet_port", "health_port"):
        assert getattr(first, attribute) != getattr(second, attribute)
    subnets = [node.cni_config(each)["plugins"][0]["ipam"]["ranges"] for each in (first, second)]
    assert subnets == [[[{"subnet": "10.244.0.0/24"}]], [[{"subnet": "10.244.1.0/24"}]]]


def test_a_kubelet_asks_who_calls_and_keeps_to_its_control_group() -> None:
    second = make_node(1)
    config = node.kubelet_config(second, Path("/ca.crt"), "10.89.0.2")
    assert config["authentication"]["anonymous"] == {"enabled": False}
    assert config["authorization"] == {"mode": "Webhook"}
    assert config["cgroupRoot"] == f"/{second.cgroup}"
    assert re.fullmatch(r"devcluster-dev-[0-9a-f]{8}-node-b", second.cgroup)


def test_clusters_of_one_name_in_two_caches_share_no_control_group() -> None:
    elsewhere = node.Node("dev", 0, Path("/other/run"), Path("/cache/images-0"))
    assert make_node(0).cgroup != elsewhere.cgroup


def test_containerd_runs_without_the_right_to_lower_the_oom_score() -> None:
    assert "restrict_oom_score_adj = true" in node.containerd_config(make_node(0), Path("/cni"))


def test_names_that_are_missing_are_never_remembered() -> None:
    text = dns.corefile(Path("/kubeconfig"), "10.89.0.2")
    assert "cache" not in text
    assert "rcode NXDOMAIN" in text


def test_dns_endpoints_carry_the_label_that_binds_them_to_the_service() -> None:
    *_, service, endpoints = dns.manifests("10.89.0.2")
    assert service["spec"]["clusterIP"] == components.DNS_IP
    assert endpoints["metadata"]["labels"]["kubernetes.io/service-name"] == service["metadata"]["name"]


def test_leases_of_ports_are_told_apart() -> None:
    leases = [PortLease() for _ in range(20)]
    try:
        assert len({lease.port for lease in leases}) == 20
    finally:
        for lease in leases:
            lease.release()


def test_a_failing_step_shows_the_end_of_its_log_and_where_the_log_is(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    with pytest.raises(DevclusterError, match=r"making tea: exit code 3; last lines of .*step\.log:\n") as error:
        run_logged("making tea", ["sh", "-c", "seq 100; echo no water >&2; exit 3"], log)
    shown = str(error.value).splitlines()[1:]
    assert shown == [f"    {line}" for line in [*range(87, 101), "no water"]]


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DevclusterError, match="making tea: not done after 0 s"):
        run_logged("making tea", ["sleep", "60"], tmp_path / "log", timeout=0.01)


def test_a_wait_names_what_it_waited_for() -> None:
    with pytest.raises(DevclusterError, match="waiting for the kettle: not so after 0 s"):
        wait_for("the kettle", lambda: None, 0)
    with pytest.raises(DevclusterError, match="waiting for the kettle: it is broken"):
        wait_for("the kettle", lambda: None, 60, failed=lambda: "it is broken")
    assert wait_for("the kettle", lambda: "hot", 0) == "hot"


def test_a_log_that_is_missing_is_said(tmp_path: Path) -> None:
    assert "no log was written" in tail(tmp_path / "none.log")


def test_what_is_missing_is_named_by_its_package() -> None:
    assert preflight.missing_packages({"sh": "dash", "no-such-program": "its-package"}) == ["its-package"]


def test_too_little_disk_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DevclusterError, match="set LORA_CACHE to a folder on a larger disk"):
        preflight.require_free(tmp_path / "not" / "yet", 2**60, "a test")


def test_a_go_that_is_missing_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    from devcluster import binaries

    monkeypatch.setattr(binaries, "_go_version", binaries._go_version.__wrapped__)
    assert cli.main(["binaries"]) == 1
    assert capsys.readouterr().err.startswith("devcluster: no `go` on PATH. Go 1.26 or newer is needed")


def test_a_user_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(DevclusterError, match="run this with sudo, or set KUBECONFIG"):
        preflight.require_root()


class TestExternalCluster:
    """``$KUBECONFIG`` decides whose cluster is used."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in (
            "KUBECONFIG",
            "LORA_S3_ENDPOINT",
            "LORA_S3_ENDPOINT_HOST",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))

    def test_unset_means_own(self) -> None:
        assert external_cluster() is None

    def test_the_kubeconfig_of_an_own_cluster_means_own(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "cache" / "clusters" / "dev" / "run" / "admin.kubeconfig"))
        assert external_cluster() is None

    def test_a_store_that_is_not_given_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBECONFIG", "/elsewhere/config")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        with pytest.raises(DevclusterError, match="set LORA_S3_ENDPOINT, AWS_SECRET_ACCESS_KEY too"):
            external_cluster()

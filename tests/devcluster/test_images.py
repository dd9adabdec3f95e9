"""What images are made of: layers, archives, names, and when one is built again."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from devcluster import busybox, loading
from devcluster.baseimage import base_name
from devcluster.binaries import module_key
from devcluster.building import check_tag, pip_settings
from devcluster.progress import DevclusterError


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

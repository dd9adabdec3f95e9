"""Which programs a cluster is made of, and of which versions."""

import re

import pytest
import yaml

from devcluster import pins
from devcluster.binaries import control_plane_group
from devcluster.paths import REPOSITORY
from devcluster.progress import DevclusterError


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

"""A node of a cluster: what it keeps to itself, and whom its kubelet answers."""

import re
from pathlib import Path

from devcluster import namespaces, node


def test_the_machines_own_settings_are_hidden_from_the_kubelet(tmp_path: Path) -> None:
    script = namespaces.setup_script(tmp_path)
    for name in namespaces.KUBELET_SYSCTLS:
        assert f"/proc/sys/{name}\n" in script
    assert script.startswith("set -e\n")


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

"""Networks, ports and names of clusters that run side by side."""

from pathlib import Path

import pytest

from devcluster import components, dns, namespaces
from devcluster.ports import PortLease
from devcluster.progress import DevclusterError


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

"""What a runtime may say of networks: what the CRD's patterns cannot refuse is refused when a run takes the runtime."""

from typing import Any

import pytest
from pydantic import ValidationError

from lora_api import ClusterLoRARuntimeSpec

GOOD: dict[str, dict[str, Any]] = {
    "a network": {"cidr": "10.0.0.0/8"},
    "one address": {"cidr": "192.0.2.7/32"},
    "everything but a part": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16", "10.0.0.0/8"]},
    "IPv6": {"cidr": "::/0", "except": ["fe80::/10", "64:ff9b::192.0.2.0/120"]},
    "all pods": {"namespaceSelector": {}},
    "ports in a row": {"podSelector": {}, "ports": [{"port": 1, "endPort": 65535, "protocol": "UDP"}]},
}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no part of the network": ({"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]}, "192.168.0.0/16 is no part of"),
    "more than the network": ({"cidr": "10.0.0.0/8", "except": ["0.0.0.0/0"]}, "0.0.0.0/0 is no part of 10.0.0.0/8"),
    "the whole network": ({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}, "10.0.0.0/8 is no part of 10.0.0.0/8"),
    "of another family": ({"cidr": "0.0.0.0/0", "except": ["fe80::/10"]}, "fe80::/10 is no part of 0.0.0.0/0"),
    "a number too large": ({"cidr": "10.0.0.256/32"}, "10.0.0.256"),
    "a prefix too long": ({"cidr": "10.0.0.0/33"}, "10.0.0.0/33"),
    "bits behind the prefix": ({"cidr": "10.0.0.1/8"}, "10.0.0.1/8 has host bits set"),
    "no IPv6": ({"cidr": ":::/64"}, ":::/64"),
    "IPv4 in IPv6": ({"cidr": "::ffff:192.0.2.0/120"}, "write addresses of IPv4 as those of IPv4"),
    "an exception of IPv4 in IPv6": (
        {"cidr": "::/0", "except": ["::ffff:169.254.169.254/128"]},
        "write addresses of IPv4 as those of IPv4",
    ),
    "a zero before the length of the prefix": ({"cidr": "10.0.0.0/08"}, "without zeros before it"),
    "two zeros": ({"cidr": "0.0.0.0/00"}, "without zeros before it"),
    "a name": ({"cidr": "example.org"}, "String should match pattern"),
    "an address alone": ({"cidr": "10.0.0.1"}, "String should match pattern"),
}


def read(rule: dict[str, Any]) -> ClusterLoRARuntimeSpec:
    return ClusterLoRARuntimeSpec.model_validate({"egress": [rule]})


@pytest.mark.parametrize("case", GOOD)
def test_a_good_rule_is_kept_as_it_is(case: str) -> None:
    assert read(GOOD[case]).to_wire()["egress"] == [GOOD[case]]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_rule_is_refused_with_its_place(case: str) -> None:
    rule, words = BAD[case]
    with pytest.raises(ValidationError) as refused:
        read(rule)
    (error,) = refused.value.errors()
    assert error["loc"][:2] == ("egress", 0)
    assert words in error["msg"]


def test_nothing_and_an_empty_list_are_different() -> None:
    assert ClusterLoRARuntimeSpec().egress is None
    assert "egress" not in ClusterLoRARuntimeSpec().to_wire()
    assert ClusterLoRARuntimeSpec.model_validate({"egress": []}).to_wire()["egress"] == []

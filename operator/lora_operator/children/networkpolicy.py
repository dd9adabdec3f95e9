"""The NetworkPolicy of a run: who may speak to its pods, and to whom they may speak. Pure.

It is the run's and not an attempt's, so that it is there before the first pod and between two attempts. Policies add
up: what another one of the namespace allows is allowed besides.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lora_api import LoRAFineTune
from lora_api.network import EgressRule, Identity
from lora_api.runtime import taken_runtime
from lora_operator.names import MANAGED_BY_LABEL, MANAGER, RUN_LABEL, UID_LABEL, build_metadata

Rule = dict[str, Any]

_METADATA_V4 = ("169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32")
_METADATA_V6 = ("fe80::/10", "fd00:ec2::254/128", "fd00:ec2::23/128", "fd20:ce::254/128")
"""Where the machines of clouds get their keys: link-local addresses, and those of Azure's and Alibaba's hosts; in IPv6
those of AWS (metadata, Pod Identity) and Google."""

_EVERYWHERE = (
    EgressRule.model_validate({"cidr": "0.0.0.0/0", "except": list(_METADATA_V4)}),
    EgressRule.model_validate({"cidr": "::/0", "except": list(_METADATA_V6)}),
    # Cilium takes an ipBlock for addresses outside of the cluster only.
    EgressRule.model_validate({"namespaceSelector": {}}),
)
"""What the pods may reach where their runtime does not say it."""

_DNS: Rule = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
"""To anywhere: a cache on the node listens on a link-local address, which no selector matches."""

_IDENTITIES: Mapping[Identity, tuple[EgressRule, ...]] = {
    # https://cloud.google.com/kubernetes-engine/docs/how-to/workload-identity: without and with Dataplane V2.
    "gke": (
        EgressRule.model_validate({"cidr": "169.254.169.252/32", "ports": [{"port": 987, "endPort": 988}]}),
        EgressRule.model_validate({"cidr": "169.254.169.254/32", "ports": [{"port": 80}, {"port": 8080}]}),
    ),
    # https://docs.aws.amazon.com/eks/latest/userguide/pod-id-agent-setup.html
    "eksPodIdentity": (
        EgressRule.model_validate({"cidr": "169.254.170.23/32", "ports": [{"port": 80}]}),
        EgressRule.model_validate({"cidr": "fd00:ec2::23/128", "ports": [{"port": 80}]}),
    ),
}


def build_network_policy(run: LoRAFineTune) -> dict[str, Any]:
    """The policy of ``run``, with what the runtime says that it took. Its name is the run's, so no other run has it."""
    runtime = taken_runtime(run)
    own = {"podSelector": {"matchLabels": {UID_LABEL: run.metadata.uid}}}
    allowed = _EVERYWHERE if runtime.egress is None else runtime.egress
    identity = _IDENTITIES[runtime.identity] if runtime.identity else ()
    labels = {RUN_LABEL: run.metadata.name, MANAGED_BY_LABEL: MANAGER}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": build_metadata(run, run.metadata.name, labels),
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}],
            "egress": [_DNS, {"to": [own]}, *_build_rules([*allowed, *identity])],
        },
    }


def _build_rules(rules: Iterable[EgressRule]) -> list[Rule]:
    return [_build_rule(rule.to_wire()) for rule in rules]


def _build_rule(wire: Rule) -> Rule:
    """A rule of a runtime in the form of Kubernetes, which has the peer apart from its ports."""
    ports = [{"protocol": "TCP", **port} for port in wire.pop("ports", ())]
    peer = wire if "cidr" not in wire else {"ipBlock": wire}
    return {"to": [peer], "ports": ports} if ports else {"to": [peer]}

"""What the pods of a run may reach: the part of a runtime from which the NetworkPolicy of a run is made.

The API server knows no rule for networks (Kubernetes 1.29 has no ``cidr`` in CEL), so what a pattern cannot say of them
is checked here, when a run takes its runtime.
"""

from ipaddress import IPv6Network, ip_network
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from lora_api import patterns
from lora_api._base import ApiModel, CelRule
from lora_api.pods import LabelMap


def _check_network(text: str) -> str:
    """As the API server checks the networks of a NetworkPolicy, beyond what is no network at all."""
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError(f"{text}: write addresses of IPv4 as those of IPv4")
    if text.partition("/")[2] != str(network.prefixlen):
        raise ValueError(f"{text}: write the length of the prefix without zeros before it")
    return text


Cidr = Annotated[
    str, StringConstraints(pattern=patterns.NETWORK, min_length=4, max_length=49), AfterValidator(_check_network)
]
"""A network such as 10.0.0.0/8 or fd00::/8, without bits behind its prefix."""


class LabelSelector(ApiModel):
    """Labels of namespaces or pods. Empty: all."""

    match_labels: LabelMap | None = Field(None, description="Labels that all have to be there.")

    cel_rules = (
        CelRule(
            rule=f"!has(self.matchLabels) || self.matchLabels.all(k, size(k) <= 316 && "
            f"k.matches('{patterns.QUALIFIED_NAME}'))",
            message="a key of matchLabels must be NAME or DOMAIN/NAME",
            field_path=".matchLabels",
        ),
    )


class EgressPort(ApiModel):
    """A port, or several in a row."""

    port: int = Field(ge=1, le=65535, description="The port, or the first one.")
    end_port: int | None = Field(None, ge=1, le=65535, description="The last one. Default: port.")
    protocol: Literal["TCP", "UDP", "SCTP"] | None = Field(None, description="Default: TCP.")

    cel_rules = (
        CelRule(
            rule="!has(self.endPort) || self.port > 65535 || self.endPort >= self.port",
            message="may not be below port",
            field_path=".endPort",
        ),
    )


class EgressRule(ApiModel):
    """Addresses or pods that a run's pods may reach: either cidr, or namespaceSelector and podSelector."""

    cidr: Cidr | None = Field(None, description="Addresses, such as 10.0.0.0/8 or fd00::/8.")
    except_: Annotated[list[Cidr], Field(max_length=32)] | None = Field(
        None,
        alias="except",
        description="Parts of cidr that may not be reached.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    namespace_selector: LabelSelector | None = Field(
        None, description="Namespaces of the pods. {} is all of them. Default: the run's namespace."
    )
    pod_selector: LabelSelector | None = Field(None, description="Pods there. Default: all.")
    ports: Annotated[list[EgressPort], Field(min_length=1, max_length=32)] | None = Field(
        None, description="Ports there. Default: all.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )

    cel_rules = (
        CelRule(
            rule="has(self.cidr) != (has(self.namespaceSelector) || has(self.podSelector))",
            message="must have either cidr, or namespaceSelector or podSelector or both",
        ),
        CelRule(rule="!has(self.except) || has(self.cidr)", message="needs cidr", field_path=".except"),
    )

    @model_validator(mode="after")
    def _check_except(self) -> Self:
        """Kubernetes refuses a policy with an exception that is no part of its network."""
        for text in self.except_ or () if self.cidr else ():
            whole, part = ip_network(self.cidr or ""), ip_network(text)
            inside = whole.version == part.version and part.prefixlen > whole.prefixlen
            if not inside or part.network_address not in whole:
                raise ValueError(f"except: {text} is no part of {self.cidr}")
        return self


EgressRules = Annotated[list[EgressRule], Field(max_length=64)]
Identity = Literal["gke", "eksPodIdentity"]

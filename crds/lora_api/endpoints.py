"""The servers that runs talk to. A ClusterLoRARuntime names them: who names a server is sent the keys of the Secret."""

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, StringConstraints

from lora_api import patterns
from lora_api._base import ApiModel

EndpointUri = Annotated[str, StringConstraints(pattern=patterns.ENDPOINT, max_length=512)]
HostList = Annotated[str, StringConstraints(pattern=patterns.HOSTS, max_length=2048)]

PUBLIC_TRACKERS = ("https://api.wandb.ai",)
"""Trackers that a run may name under every runtime and without one."""


class Endpoints(ApiModel):
    """The servers that runs talk to. What is absent is the public one: AWS, huggingface.co, and no proxy.

    An http:// address carries keys, models and records in clear text.
    """

    store: EndpointUri | None = Field(
        None, description="Address of the object store (AWS_ENDPOINT_URL in the pods). Default: AWS."
    )
    hub: EndpointUri | None = Field(
        None, description="Address of the model hub of hf:// URIs (HF_ENDPOINT in the pods). Default: huggingface.co."
    )
    proxy: EndpointUri | None = Field(
        None,
        description="Proxy through which the pods reach store, hub and trackers (HTTP_PROXY and HTTPS_PROXY in the "
        "pods). Default: none.",
    )
    no_proxy: HostList | None = Field(
        None, description="Hosts that are reached without the proxy, with commas between them (NO_PROXY in the pods)."
    )
    tracking: Annotated[list[EndpointUri], Field(min_length=1, max_length=32)] | None = Field(
        None,
        description="Trackers that runs may name in tracking.wandb.baseUrl and tracking.mlflow.trackingUri. "
        "https://host/a allows https://host/a/b but not https://host/ab. Default: Weights & Biases' public service "
        "only.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


_SLASH = r"(/|%2f|\\|%5c)"
_CLIMBS = re.compile(rf"{_SLASH}(\.|%2e){{1,2}}({_SLASH}|[?#]|$)", re.IGNORECASE)


def is_below(uri: str, prefix: str) -> bool:
    """Whether ``prefix`` is ``uri`` or lies above it by whole parts: s3://bucket/a is not above s3://bucket/ab."""
    return uri == prefix or uri.startswith(prefix if prefix.endswith("/") else f"{prefix}/")


def allows_tracker(trackers: Iterable[str], uri: str) -> bool:
    """Whether a run may send to ``uri`` where ``trackers`` are allowed. A path that climbs is below nothing."""
    return not _CLIMBS.search(uri) and any(
        is_below(uri.rstrip("/"), tracker.rstrip("/")) for tracker in (*PUBLIC_TRACKERS, *trackers)
    )

"""What is in the peers' modules for a cluster, made to fit processes beside an API server. All pure.

What changes: who calls (a user in place of a service account), where their webhooks are (an address in place of a
Service, and certificates of the control plane in place of their own), and their ports. What decides how fast they are,
such as clients' rates, workers and leader election, stays as it is shipped.
"""

import base64
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Raw = dict[str, Any]


def build_rights(user: str, roles: Iterable[Raw]) -> list[Raw]:
    """A cluster role with all rules of ``roles`` for ``user``."""
    group = "rbac.authorization.k8s.io"
    rules = [rule for role in roles for rule in role["rules"]]
    version = f"{group}/v1"
    return [
        {"apiVersion": version, "kind": "ClusterRole", "metadata": {"name": user}, "rules": rules},
        {
            "apiVersion": version,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": user},
            "roleRef": {"kind": "ClusterRole", "name": user, "apiGroup": group},
            "subjects": [{"kind": "User", "name": user, "apiGroup": group}],
        },
    ]


def build_webhooks(
    name: str, shipped: Iterable[Raw], port: int, authority: bytes, selectors: Mapping[str, Raw]
) -> list[Raw]:
    """The webhook configurations of a peer, under ``name``, served on ``port`` of this machine.

    ``selectors``: objectSelector by the name of a webhook, which is a patch on top of what is shipped.
    """
    made = []
    for configuration in copy.deepcopy(list(shipped)):
        configuration["metadata"]["name"] = name
        for webhook in configuration["webhooks"]:
            path = webhook["clientConfig"]["service"]["path"]
            webhook["clientConfig"] = {
                "url": f"https://127.0.0.1:{port}{path}",
                "caBundle": base64.b64encode(authority).decode(),
            }
            if webhook["name"] in selectors:
                webhook["objectSelector"] = selectors[webhook["name"]]
        made.append(configuration)
    return made


def read_selectors(patches: Iterable[Sequence[Raw]]) -> dict[str, Raw]:
    """The objectSelectors that JSON patches give to whole webhooks, by the webhook's name."""
    values = [operation["value"] for patch in patches for operation in patch]
    return {
        value["name"]: value["objectSelector"]
        for value in values
        if isinstance(value, dict) and "objectSelector" in value
    }


def build_config(shipped: Raw, ports: Mapping[str, int], namespace: str, certificates: str) -> Raw:
    """The configuration of a peer, with its own ports, and certificates that others make (``certificates``: by key)."""
    config = copy.deepcopy(shipped)
    config.setdefault("health", {})["healthProbeBindAddress"] = f"127.0.0.1:{ports['health']}"
    config.setdefault("metrics", {})["bindAddress"] = f"127.0.0.1:{ports['metrics']}"
    config.setdefault("webhook", {}).update({"host": "127.0.0.1", "port": ports["webhook"]})
    config.setdefault("leaderElection", {})["resourceNamespace"] = namespace
    config[certificates] = {"enable": False}
    return config


def build_train_job(name: str) -> Raw:
    """A TrainJob of two nodes, of the runtime for PyTorch that is shipped."""
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {"runtimeRef": {"name": RUNTIME}, "trainer": {"numNodes": 2}},
    }


RUNTIME = "torch-distributed"
"""Name of the ClusterTrainingRuntime."""

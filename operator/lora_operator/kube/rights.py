"""What the operator may do on the API server, and therefore all that its RBAC role holds."""

from dataclasses import dataclass

from lora_api import GROUP
from lora_api.runtime import DEFAULT_RUNTIME
from lora_api.runtime import PLURAL as RUNTIMES


@dataclass(frozen=True)
class Rule:
    """One rule of the operator's role."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    why: str
    names: tuple[str, ...] = ()
    """The objects that it is about; empty: all."""

    cluster: bool = False
    """Whether its objects are those of the whole cluster, also where the operator serves some namespaces only."""


RBAC: tuple[Rule, ...] = (
    Rule("lorafinetune.io", ("lorafinetunes",), ("delete", "get", "list", "watch"), "what is asked for, and its end"),
    Rule("lorafinetune.io", ("lorafinetunes/status",), ("patch",), "what was seen, by server-side apply"),
    Rule(
        "batch",
        ("jobs",),
        ("create", "delete", "get", "list", "patch", "watch"),
        "the gang of an attempt: make it, end it, follow it",
    ),
    Rule("", ("services",), ("create", "delete", "get"), "the names by which pods of a gang find each other"),
    Rule("", ("configmaps",), ("delete", "get"), "input that earlier releases gave to pods: it goes with the rest"),
    Rule(
        "networking.k8s.io",
        ("networkpolicies",),
        ("create", "delete", "get"),
        "who may speak to the pods of a run, and to whom they may",
    ),
    Rule("", ("namespaces",), ("get",), "labels of a run's namespace: who may take a runtime"),
    Rule("", ("pods",), ("get", "list", "watch"), "how the pods of the gang fare"),
    Rule("", ("pods/log",), ("get",), "progress, and the last lines of a failed pod"),
    Rule("events.k8s.io", ("events",), ("create", "list"), "tell changes of state; why a Job's pods are not made"),
    Rule("kueue.x-k8s.io", ("workloads",), ("list",), "why a run waits in its queue"),
    Rule("visibility.kueue.x-k8s.io", ("localqueues/pendingworkloads",), ("get",), "the number of a run in its queue"),
    Rule(GROUP, (RUNTIMES,), ("get", "list", "watch"), "what runs take from an administrator", cluster=True),
    Rule(
        GROUP,
        (RUNTIMES,),
        ("create", "patch"),
        "the one that comes with the chart (--default-runtime)",
        names=(DEFAULT_RUNTIME,),
        cluster=True,
    ),
)

_PODGROUP_VERBS = ("create", "delete", "get")
GANG_RBAC: dict[str, Rule] = {
    "volcano": Rule("scheduling.volcano.sh", ("podgroups",), _PODGROUP_VERBS, "what Volcano starts together"),
    "coscheduling": Rule("scheduling.x-k8s.io", ("podgroups",), _PODGROUP_VERBS, "what coscheduling starts together"),
}
"""The rule on top of RBAC where the operator works with a gang scheduler."""

REVIEW_RBAC: tuple[Rule, ...] = (
    Rule("authentication.k8s.io", ("tokenreviews",), ("create",), "who asks for /metrics", cluster=True),
    Rule("authorization.k8s.io", ("subjectaccessreviews",), ("create",), "whether they may have it", cluster=True),
)
"""The rules on top of RBAC where /metrics is for those whom the API server lets get it (--metrics-auth=token)."""

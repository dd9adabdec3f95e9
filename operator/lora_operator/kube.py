"""The only way to the API server: a thin client on raw JSON, with the official package for credentials.

Model classes of the official package are not used: they cost most of the memory and time (docs/decisions). What the
operator may do, and therefore all that its RBAC role holds, is the table ``RBAC``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One rule of the operator's role."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    why: str


RBAC: tuple[Rule, ...] = (
    Rule("lorafinetune.io", ("lorafinetunes",), ("get", "list", "watch"), "what is asked for"),
    Rule("lorafinetune.io", ("lorafinetunes/status",), ("patch",), "what was seen, by server-side apply"),
    Rule(
        "batch",
        ("jobs",),
        ("create", "delete", "get", "list", "patch", "watch"),
        "the gang of an attempt: apply, end it, follow it",
    ),
    Rule("", ("services", "configmaps"), ("create", "get", "patch"), "name and input of the gang: apply"),
    Rule("", ("pods",), ("get", "list", "watch"), "how the pods of the gang fare"),
    Rule("", ("pods/log",), ("get",), "progress, and the last lines of a failed pod"),
    Rule("events.k8s.io", ("events",), ("create", "list"), "tell changes of state; why a Job's pods are not made"),
)

"""The nodes of the soak, and which of them a pod gets. Pure."""

from collections.abc import Iterator

from bench.scale.client import Raw

NODES = tuple(f"node-{number}" for number in range(8))
"""Enough of them that no run has to avoid all."""

BAD_NODES = ("bad-0", "bad-1")
"""Nodes that reject every pod. The scheduler does not know, and finds them the emptiest."""

_NAME = "metadata.name"


def choose_node(pod: Raw, index: int, bad: int) -> str:
    """The node that the scheduler gives to the pod of rank ``index``: always the same, as long as the pod takes it.

    The first ``bad`` of ``BAD_NODES`` are better than all others.

    Raises:
        ValueError: the pod takes none.
    """
    avoided = set(find_avoided(pod))
    start = index % len(NODES)
    nodes = (*BAD_NODES[:bad], *NODES[start:], *NODES[:start])
    node = next((name for name in nodes if name not in avoided), None)
    if node is None:
        raise ValueError(f"pod {pod['metadata']['name']} takes no node: it avoids {sorted(avoided)}")
    return node


def find_avoided(pod: Raw) -> Iterator[str]:
    """The nodes that ``pod`` keeps away from."""
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms", ()):
        for rule in term.get("matchFields", ()):
            if (rule["key"], rule["operator"]) == (_NAME, "NotIn"):
                yield from rule["values"]

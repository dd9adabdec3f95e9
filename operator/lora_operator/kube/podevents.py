"""What Events say: of a pod that has a node, why it does not start. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

OF_THE_NODE = frozenset(
    {"FailedMount", "FailedMapVolume", "FailedCreatePodSandBox", "NetworkNotReady", "FailedPrepareDynamicResources",
     "FailedCreatePodContainer"}
)  # fmt: skip
"""Reasons of a kubelet whose volumes, network, devices or cgroups do not work, so that no container is made."""

BLOCKING = OF_THE_NODE | {"FailedAttachVolume", "FailedMountOnFilesystemMismatch", "Unhealthy"}
"""Reasons of the kubelet and of the controller of volumes for what a pod does not start without.

Others, such as those of a policy that only looks on, are written about pods that are well.
"""

_PROGRESS = frozenset({"Scheduled", "SuccessfulAttachVolume", "Pulling", "Pulled", "Created", "Started"})
"""Reasons of Events by which a pod has got further: what was warned of before that has passed."""

_OF_CONTAINERS = frozenset({"Failed", "BackOff", "ErrImageNeverPull", "InspectFailed"})
"""Warnings about an image that is not pulled or a container that is not made. The pod's status tells of them better.
Its volumes and its network are there by then.
"""

_OF_THE_SCHEDULER = frozenset({"FailedScheduling", "FailedBinding"})
"""Warnings about a pod that has no node yet. They stay, and may be written after it has got one."""


_COMBINED = "(combined from similar events): "
"""How the note of an Event begins that stands for more than ten which differ in some words, such as a pod's name
(client-go's recorder, Kubernetes 1.29 to 1.37)."""


def read_note(event: Mapping[str, Any]) -> str:
    """The words of ``event`` itself, also where it stands for several."""
    return str(event.get("note") or "").removeprefix(_COMBINED)


def find_warning(events: Iterable[Mapping[str, Any]]) -> str:
    """Reason and note of the newest warning that holds still, first of those that block; empty if there is none."""
    ordered = sorted(events, key=lambda event: int(event["metadata"]["resourceVersion"]))
    blocks = other = ""
    for event in ordered:
        reason = event.get("reason") or ""
        if event.get("type") != "Warning":
            blocks = "" if reason in _PROGRESS else blocks
        elif reason in _OF_CONTAINERS:
            blocks = ""
        elif reason in BLOCKING:
            blocks = f"{reason}: {read_note(event)}"
        elif reason not in _OF_THE_SCHEDULER:
            other = f"{reason}: {read_note(event)}"
    return blocks or other

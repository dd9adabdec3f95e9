"""Whose adapter a status may name: the run's own. Pure.

Last words come from a pod, and whoever may create pods in a namespace can write some; a status may have been restored
from another cluster or namespace. What is below another run's prefix in the store was published by that run.
"""

import re
from dataclasses import replace

from lora_api import AdapterStatus, ConditionType, LoRAFineTune
from lora_api.adapter import adapter_prefix, digest_directory, merged_directory
from lora_operator.state.plan import Mark

FOREIGN_ADAPTER = "ForeignAdapter"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def find_foreign(run: LoRAFineTune, adapter: AdapterStatus) -> str | None:
    """What of ``adapter`` cannot be ``run``'s, for people; ``None``: it is where the run publishes."""
    publish = run.spec.publish
    name = publish.name or run.metadata.name
    prefix = adapter_prefix(run.metadata.namespace, name)
    served = f"{name}-v{adapter.version}"
    if not _DIGEST.fullmatch(adapter.digest):
        return f"{adapter.digest[:200]!r} is no digest"
    if adapter.served_name != served:
        return f"{adapter.served_name[:200]} is not the name of its version {adapter.version}, {served}"
    directories = {
        adapter.uri: f"{prefix}/{digest_directory(adapter.digest)}",
        adapter.merged_uri: f"{prefix}/{merged_directory(adapter.digest)}",
    }
    for uri, directory in directories.items():
        store = publish.store.rstrip("/") if publish.store else ""
        whole = f"{store}/{directory}"
        if uri is not None and uri != whole and not (not store and uri.endswith(whole)):
            return f"{uri[:500]} is not {whole[:500]}, where this run publishes"
    return None


def disown(run: LoRAFineTune, adapter: AdapterStatus) -> dict[ConditionType, Mark]:
    """What the conditions say of an adapter that is not ``run``'s; nothing of one that is.

    The end of the run stays as it is: training once more would not change whose adapter that is.
    """
    problem = find_foreign(run, adapter)
    if problem is None:
        return {}
    remedy = "do not serve it, and look at who made the pod, its image, or the status"
    message = f"status.adapter is not this run's: {problem}. Remedy: {remedy}"
    mark = Mark(value=False, reason=FOREIGN_ADAPTER, message=message)
    return {ConditionType.PUBLISHED: mark, ConditionType.READY: mark, ConditionType.STALLED: replace(mark, value=True)}

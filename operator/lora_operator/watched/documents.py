"""Our own resources in the cache: what is asked of all of them at once, and the whole as JSON.

JSON takes a sixth of what a dictionary takes, and most runs have ended: nobody reads them again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from lora_api.runtime import DEFAULT_RUNTIME
from lora_operator.objects import Raw

_KEPT = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")


@dataclass(frozen=True, slots=True)
class Document:
    """One of our resources without the parts of its metadata that nobody here reads: they are most of its size."""

    uid: str
    version: int
    json: bytes

    def read(self) -> Raw:
        """A dictionary of it, which is the caller's own."""
        return dict(from_json(self.json))


@dataclass(frozen=True, slots=True)
class RunDocument(Document):
    """A LoRAFineTune."""

    phase: str
    tokens_per_second: float
    awaits: str
    """Name of the runtime that it is to take when it begins; empty when it has begun."""


def parse_document(raw: Mapping[str, Any]) -> Document:
    """Any of our resources."""
    metadata = raw["metadata"]
    kept = {
        "metadata": {field: metadata[field] for field in _KEPT if field in metadata},
        "spec": raw.get("spec") or {},
        "status": raw.get("status") or {},
    }
    return Document(metadata["uid"], int(metadata["resourceVersion"]), to_json(kept))


def parse_run_document(raw: Mapping[str, Any]) -> RunDocument:
    """A LoRAFineTune."""
    document, status = parse_document(raw), raw.get("status") or {}
    begun = status.get("attempt") or status.get("runtime")
    return RunDocument(
        uid=document.uid,
        version=document.version,
        json=document.json,
        phase=status.get("phase") or "Pending",
        tokens_per_second=(status.get("progress") or {}).get("tokensPerSecond") or 0.0,
        awaits="" if begun else runtime_name(raw.get("spec") or {}),
    )


def runtime_name(spec: Raw) -> str:
    """Name of the runtime of a run with the specification ``spec``."""
    return str((spec.get("runtimeRef") or {}).get("name", DEFAULT_RUNTIME))

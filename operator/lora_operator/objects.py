"""What everything speaks of: objects as the API server has them, and the keys of runs."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

Raw = dict[str, Any]


Key = tuple[str, str]
"""Namespace and name of a LoRAFineTune."""


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time, or ``None`` if there is none."""
    return datetime.fromisoformat(text) if text else None


def controller_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The owner reference of the controller, or an empty mapping."""
    owners = metadata.get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})

"""Fields of the status that the CRD of this cluster does not have, because it is older than the operator.

Server-side apply refuses a body with such a field as a whole ("field not declared in schema"), and with it all that the
older CRD could take. A CRD that is upgraded later may have the field, so what was learned is forgotten after a while.
"""

import re
import time
from collections.abc import Callable
from typing import Any

_REFUSED = re.compile(r"\.status((?:\.\w+|\[[^]]*\])+): field not declared in schema")
_FORGET_AFTER = 600.0

Path = tuple[str, ...]


class Undeclared:
    """What is known to be left out of statuses, so that the rest of them is taken."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._paths: frozenset[Path] = frozenset()
        self._since = 0.0

    def learn(self, message: str) -> tuple[str, ...]:
        """The fields that the API server's ``message`` names and that were not known, as paths below the status."""
        found = {tuple(re.findall(r"\.(\w+)", path)) for path in _REFUSED.findall(message)} - self._paths
        if found:
            self._paths, self._since = self._paths | found, self._clock()
        return tuple(sorted(".".join(path) for path in found))

    def leave_out(self, status: dict[str, Any]) -> dict[str, Any]:
        """``status`` without them."""
        if self._paths and self._clock() - self._since > _FORGET_AFTER:
            self._paths = frozenset()
        for path in self._paths:
            status = _without(status, path)
        return status


def _without(node: Any, path: Path) -> Any:
    """A copy of ``node`` without the field at ``path``, in every item of the lists on the way."""
    if isinstance(node, list):
        return [_without(item, path) for item in node]
    if not isinstance(node, dict) or path[0] not in node:
        return node
    if len(path) == 1:
        return {name: value for name, value in node.items() if name != path[0]}
    return {**node, path[0]: _without(node[path[0]], path[1:])}

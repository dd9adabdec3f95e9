"""What the CRD of this cluster does not take of a status, because it is older than the operator.

The API server refuses a status as a whole for one field that the schema does not have, or for one word that it does not
list, and with it all that the older CRD could take. A CRD that is upgraded later takes more, so what was learned is
forgotten after a while.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from lora_api import FailureClass

_NO_FIELD = re.compile(r"\.status((?:\.\w+|\[[^]]*\])+): field not declared in schema")
_NO_WORD = re.compile(r'(?:status\.|(?<![\w.]))(phase|failures\[\d+\]\.class): Unsupported value: "(\w+)"')
"""Kubernetes before 1.31 names a field of the status without ``status``."""

_FORGET_AFTER = 600.0
_MAX_MESSAGE = 4096

Path = tuple[str, ...]


class Undeclared:
    """What is known to be left out of statuses, so that the rest of them is taken."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fields: frozenset[Path] = frozenset()
        self._words: frozenset[str] = frozenset()
        self._since = 0.0

    def learn(self, message: str) -> tuple[str, ...]:
        """The fields and words that the API server's ``message`` names and that were not known before."""
        fields = {tuple(re.findall(r"\.(\w+)", path)) for path in _NO_FIELD.findall(message)} - self._fields
        words = {word for _, word in _NO_WORD.findall(message)} - self._words
        if fields or words:
            self._fields, self._words, self._since = self._fields | fields, self._words | words, self._clock()
        return tuple(sorted([f"status.{'.'.join(path)}" for path in fields] + [f"the word {word}" for word in words]))

    def leave_out(self, status: dict[str, Any]) -> dict[str, Any]:
        """``status`` without them. A failure of a class that is not taken is an Internal one, with the class's name."""
        if self._clock() - self._since > _FORGET_AFTER:
            self._fields, self._words = frozenset(), frozenset()
        for path in self._fields:
            status = _without(status, path)
        if status.get("phase") in self._words:
            status = _without(status, ("phase",))
        if any(failure["class"] in self._words for failure in status.get("failures", ())):
            status = {**status, "failures": [self._reword(failure) for failure in status["failures"]]}
        return status

    def _reword(self, failure: dict[str, Any]) -> dict[str, Any]:
        if failure["class"] not in self._words:
            return failure
        message = f"{failure['class']}: {failure.get('message', '')}"[:_MAX_MESSAGE]
        return {**failure, "class": str(FailureClass.INTERNAL), "message": message}


def _without(node: Any, path: Path) -> Any:
    """A copy of ``node`` without the field at ``path``, in every item of the lists on the way."""
    if isinstance(node, list):
        return [_without(item, path) for item in node]
    if not isinstance(node, dict) or path[0] not in node:
        return node
    if len(path) == 1:
        return {name: value for name, value in node.items() if name != path[0]}
    return {**node, path[0]: _without(node[path[0]], path[1:])}

"""Keeps workers free where creating things takes long, because a webhook hangs: the other namespaces need them. Pure.

Creates of a namespace that has answered so far get a short time. After one that was not answered in it, the namespace
is slow: its creates get all the time that calls have, but few workers, and so do those of all slow namespaces together.
The runs that find none come back a little later. The namespace is slow no more once a launch in it has been quick.
"""

from collections import Counter

HURRY = 1.5
"""Seconds in which a create is answered where nothing is wrong."""


class Lanes:
    """Which namespaces are slow, and what is under way in them. ``workers``: looks at the same time."""

    def __init__(self, workers: int) -> None:
        self._most_each = max(1, workers // 4)
        self._most = max(1, workers // 2)
        self._slow: set[str] = set()
        self._busy: Counter[str] = Counter()

    def patience(self, namespace: str) -> float | None:
        """Seconds that a create in ``namespace`` gets; ``None``: all the time that calls have."""
        return None if namespace in self._slow else HURRY

    def enter(self, namespace: str) -> bool:
        """Whether a launch in ``namespace`` may begin; ``leave`` has to follow then."""
        if namespace in self._slow and self._is_full(namespace):
            return False
        self._busy[namespace] += 1
        return True

    def _is_full(self, namespace: str) -> bool:
        busy = sum(count for other, count in self._busy.items() if other in self._slow)
        return self._busy[namespace] >= self._most_each or busy >= self._most

    def leave(self, namespace: str, seconds: float, *, answered: bool) -> None:
        """A launch is over that took so many ``seconds``."""
        self._busy[namespace] -= 1
        if not self._busy[namespace]:
            del self._busy[namespace]
        if not answered:
            self._slow.add(namespace)
        elif seconds < HURRY:
            self._slow.discard(namespace)

"""Nodes whose kubelets do not answer: no log is asked of them for a while. Pure: every time is given to it."""

from collections.abc import Mapping
from types import MappingProxyType

TIMEOUTS = 3
PAUSE = 60.0
"""So many reads in a row that got no answer, and the seconds for which nothing is asked then."""


class HungNodes:
    """Counts reads without an answer, by node."""

    def __init__(self) -> None:
        self._timeouts: dict[str, int] = {}
        self._until: dict[str, float] = {}

    @property
    def paused(self) -> Mapping[str, float]:
        """Until when nothing is asked of which node."""
        return MappingProxyType(self._until)

    def is_paused(self, node: str, now: float) -> bool:
        """Whether nothing is to be asked of ``node``."""
        return self._until.get(node, 0.0) > now

    def saw_answer(self, node: str) -> None:
        """A kubelet has answered, whatever it said."""
        self._timeouts.pop(node, None)
        self._until.pop(node, None)

    def saw_timeout(self, node: str, now: float) -> None:
        """A kubelet has not answered. One that is asked again after its pause gets no more than one try."""
        self._timeouts[node] = self._timeouts.get(node, 0) + 1
        if self._timeouts[node] >= TIMEOUTS:
            self._until[node] = now + PAUSE

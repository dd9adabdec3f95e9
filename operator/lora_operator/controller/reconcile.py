"""The operator on one screen: what happens each time something about an object may have changed.

    watch event -> wake(key) -> queue -> reconcile(key)

``reconcile`` looks at the whole object every time and needs no memory of what happened before (level-triggered). A
function that starts with fetch_, apply_, patch_, delete_ or emit_ talks to the API server; parse_, build_, decide_,
compute_ and diagnose_ are pure. An operator that is killed between any two calls leaves a state from which the next one
goes on. What the objects are is not known here: a ``Kind`` brings what there is to see, to decide and to do.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from lora_operator.logformat import current_run
from lora_operator.objects import Key

S = TypeVar("S")
P = TypeVar("P")

ROUNDS = 10
"""More rounds of questions than any look needs: each asks what is not answered yet."""


class UnreadableError(Exception):
    """An object is not understood. ``again_after`` are the seconds until it is to be looked up again."""


class Kind(Protocol[S, P]):
    """What one kind of object brings: ``S`` is all that is seen of one, ``P`` what is decided about it."""

    def observe(self, key: Key, answers: Mapping[Any, Any]) -> S | None:
        """What is there by now; ``None``: the object is gone.

        Raises:
            UnreadableError: it is not understood.
        """

    def questions(self, seen: S, now: datetime) -> Iterable[Hashable]:
        """What has to be looked up before anything is decided."""

    async def answer(self, key: Key, seen: S, question: Any) -> Any:
        """Looks it up. What is watched goes to the cache, and the answer is what is not."""

    def decide(self, seen: S, now: datetime) -> P:
        """What to do, and what to say."""

    def read_beside(self, seen: S, plan: P, now: datetime) -> None:
        """Has things read which no watch shows, and which this look does not wait for."""

    async def act(self, seen: S, plan: P) -> bool:
        """Does what was decided; ``False``: something stood in the way, and there is to be another decision."""

    async def record(self, seen: S, plan: P) -> float | None:
        """Writes the status if it has changed, then posts Events; returns the seconds until the next look."""

    async def leave_alone(self, key: Key, error: UnreadableError) -> float | None:
        """Ends nothing and writes over nothing of what is not understood."""

    def forget(self, key: Key) -> None:
        """The object is gone."""


class Reconciler(Generic[S, P]):
    """Brings one object at a time to where it should be."""

    def __init__(self, kind: Kind[S, P], clock: Callable[[], datetime]) -> None:
        self._kind = kind
        self._clock = clock

    async def reconcile(self, key: Key) -> float | None:
        """Looks at one object; returns the seconds after which to look again without an event, or ``None``."""
        current_run.set("/".join(key))
        # 1. See what is there, and look up what the watches cannot know.
        try:
            seen = await self._see(key)
        except UnreadableError as error:
            return await self._kind.leave_alone(key, error)
        if seen is None:
            self._kind.forget(key)
            return None
        # 2. Decide, once.
        now = self._clock()
        plan = self._kind.decide(seen, now)
        # 3. Have read what no watch shows; that wakes the object again.
        self._kind.read_beside(seen, plan, now)
        # 4. Act.
        if not await self._kind.act(seen, plan):
            return 0.0
        # 5. Write the status, once, and tell of it.
        return await self._kind.record(seen, plan)

    async def _see(self, key: Key) -> S | None:
        answers: dict[Any, Any] = {}
        for _ in range(ROUNDS):
            seen = self._kind.observe(key, answers)
            if seen is None:
                return None
            asked = [question for question in self._kind.questions(seen, self._clock()) if question not in answers]
            if not asked:
                return seen
            for question in asked:
                answers[question] = await self._kind.answer(key, seen, question)
        raise RuntimeError(f"{'/'.join(key)}: no end of questions, the last of which are {asked}")

"""The gang's line: what its processes say to each other beside their collective operations.

A TCPStore on rank 0, which the process group uses to meet as well. Over it a process tells the others that it was asked
to stop, how far it is, and, once a connection is lost, that it is still there: who does not answer that roll call is
the one that is missing. gloo and NCCL themselves only say that somebody was.

A message is a key whose name only the run's processes can make (``seal``): what others write there is not heard.

Everything here is best effort. Where rank 0 itself is gone, the line is gone, and that is what is reported.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from lora_api.failures import FailureClass
from lora_trainer.errors import PeerLostError
from lora_trainer.seal import Seal, Word
from lora_trainer.settings import Place, rendezvous_address, rendezvous_seconds
from lora_trainer.stop import StopRequest

ROLL_CALL_SECONDS = 3.0
"""How long a process waits for the others to say that they lost a peer too. They do when the connection closes, or when
their own collective operation times out, which began at about the same time."""

FAREWELL_SECONDS = 1.0
"""How long a process that leaves waits for rank 0 to be reached, and then for the others to have heard of it."""

TIDY_SECONDS = 1.0
"""How often old messages are deleted, and rank 0 looks for strangers."""

ANY_RANK = -1
"""In place of a rank: the message that everybody waits for, whoever says it."""

UNSEALED = "stop"
"""What asks a gang to stop without the run's key: a stranger wrote it, or a trainer of another version."""

_LOST = (RuntimeError, ValueError)
"""What a TCPStore raises (torch 2.13): DistError is a RuntimeError."""


class Line:
    """This process's end of the line. For a process alone, all calls do nothing."""

    def __init__(self, place: Place, stop: StopRequest, seal: Seal) -> None:
        self._place, self._stop, self._seal = place, stop, seal
        self._server: dist.TCPStore | None = None
        self._voice: dist.TCPStore | None = None
        self._problem: BaseException | None = None
        self._connected = threading.Event()
        self._others = [rank for rank in range(place.world_size) if rank != place.rank]
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._begun: dict[int, float] = {}
        """When this process began its last two steps (``time.monotonic()``)."""
        self._outdated: deque[str] = deque()

    def open(self) -> None:
        """Connects in the background: rank 0's pod may start much later than this one."""
        if not self._others:
            return
        if self._place.is_main and not self._seal.is_secret:
            _say(
                "the run document has no controlKey, so messages between the processes are not authenticated: whoever "
                "reaches rank 0's port can end this attempt"
            )
        self._thread.start()
        self._stop.announce = self.announce_stop

    def group_store(self) -> dist.Store:
        """The store for the process group.

        Raises:
            PeerLostError: rank 0 was not there within LORA_RENDEZVOUS_SECONDS.
        """
        deadline = time.monotonic() + rendezvous_seconds()
        while self._server is None:
            if self._problem is not None or time.monotonic() > deadline:
                raise PeerLostError(f"rank 0 cannot be reached: {self._problem}") from self._problem
            time.sleep(0.05)
        return dist.PrefixStore("group", self._server)

    def beat(self, step: int) -> None:
        """Says that this process begins ``step``. Only the last two steps stay in the store."""
        self._say("beat", str(step))
        self._begun[step] = time.monotonic()
        if self._begun.pop(step - 2, None) is not None:
            self._outdated.append(self._seal.name("beat", self._place.rank, str(step - 2)))

    def announce_stop(self) -> None:
        """Tells the others that this process was asked to stop."""
        self._announce("")

    def announce_failure(self, what: FailureClass) -> None:
        """Tells the others that this process ends with ``what``; those that wait for it while they load end too."""
        if self._others:
            self._connected.wait(FAREWELL_SECONDS)
        self._announce(what.value)
        self._missing("left", FAREWELL_SECONDS, self._others)

    def _announce(self, failure: str) -> None:
        self._say("asked", failure)
        self._set(self._seal.name("stop", ANY_RANK))

    def leave(self) -> None:
        """Tells the others that this process stops and leaves; waits for them to have heard it, but not long."""
        if self._others:
            self._connected.wait(FAREWELL_SECONDS)
        self.announce_stop()
        self._say("left")
        self._missing("left", FAREWELL_SECONDS, self._others)

    def explain(self, problem: str) -> str:
        """``problem``, a lost connection, with the ranks that do not answer, and where they were seen last."""
        if self._voice is None:
            return problem
        self._say("lost")
        if self._place.rank != 0 and self._missing("lost", 1.0, [self._place.rank]):
            return f"rank 0 does not answer. {problem}"
        missing = self._missing("lost", ROLL_CALL_SECONDS, self._others)
        words = [self._last_seen(rank) for rank in missing]
        self._say("said")
        if self._place.rank == 0:  # it holds the line: the others need a moment to read it too
            self._missing("said", FAREWELL_SECONDS, [rank for rank in self._others if rank not in missing])
        return "; ".join(words) + f". {problem}" if words else problem

    def _last_seen(self, rank: int) -> str:
        """``rank`` with the step that it began last: that of this process, or the one before or after it.

        All ranks vote at the end of each step, so none is further from the others than that.
        """
        text = f"rank {rank} does not answer"
        newest = max(self._begun, default=0)
        for step in (newest + 1, newest, newest - 1):
            if self._is_said("beat", rank, str(step)):
                begun = self._begun.get(step)
                ago = "" if begun is None else f", {time.monotonic() - begun:.0f} s ago"
                return f"{text}; it was last seen at the start of step {step}{ago}"
        return f"{text}; it had not begun to train"

    def _missing(self, word: Word, seconds: float, ranks: Iterable[int]) -> list[int]:
        """Which of ``ranks`` did not say ``word`` within ``seconds``."""
        deadline = time.monotonic() + seconds
        missing = []
        for rank in ranks:
            left = max(0.05, deadline - time.monotonic())
            try:
                if self._voice is None:
                    return list(ranks)
                self._voice.wait([self._seal.name(word, rank)], timedelta(seconds=left))
            except _LOST:
                missing.append(rank)
        return missing

    def _say(self, word: Word, content: str = "") -> None:
        self._set(self._seal.name(word, self._place.rank, content))

    def _is_said(self, word: Word, rank: int, content: str = "") -> bool:
        try:
            return self._voice is not None and self._voice.check([self._seal.name(word, rank, content)])
        except _LOST:
            return False

    def _set(self, name: str) -> None:
        if self._voice is None:
            return
        try:
            self._voice.set(name, "")
        except _LOST:
            return

    def _listen(self) -> None:
        """Connects, then waits for somebody to be asked to stop."""
        host, port = rendezvous_address()
        timeout = timedelta(seconds=rendezvous_seconds())
        try:
            server = dist.TCPStore(
                host,
                port,
                self._place.world_size,
                is_master=self._place.rank == 0,
                timeout=timeout,
                wait_for_workers=False,
            )
            # A connection each: one that waits is closed to others, and a new one to a lost rank 0 would be retried.
            ear, self._voice, broom = server.clone(), server.clone(), server.clone()
            self._server = server
            self._connected.set()
        except (*_LOST, OSError) as error:
            self._problem = error
            return
        threading.Thread(target=self._tidy, args=(broom,), name="line's tidying", daemon=True).start()
        if self._stop.requested:
            self.announce_stop()
        while True:
            try:
                ear.wait([self._seal.name("stop", ANY_RANK)], timedelta(hours=1))
            except dist.DistStoreError:
                continue
            except _LOST:
                return
            self._stop.request(self._who_stops())
            return

    def _who_stops(self) -> str:
        for rank in self._others:
            if self._is_said("asked", rank):
                return f"rank {rank}"
            for failure in FailureClass:
                if self._is_said("asked", rank, failure.value):
                    return f"rank {rank}, which failed ({failure.value})"
        return "another rank"

    def _tidy(self, broom: dist.TCPStore) -> None:
        """Deletes what is no longer true. On rank 0 also says, once, that a stranger asked the gang to stop.

        In a thread of its own: an answer of a rank 0 that hangs does not come, and training must not wait for it.
        """
        unheard = self._place.is_main
        try:
            while True:
                time.sleep(TIDY_SECONDS)
                while self._outdated:
                    broom.delete_key(self._outdated.popleft())
                if unheard and broom.check([UNSEALED]):
                    unheard = False
                    _say("a message that asks this gang to stop is ignored: it was not made with the key of this run")
        except _LOST:
            return


def _say(text: str) -> None:
    sys.stderr.write(f"line: {text}\n")
    sys.stderr.flush()

"""The gang's line: what its processes say to each other beside their collective operations.

A TCPStore on rank 0, which the process group uses to meet as well. Over it a process tells the others that it was asked
to stop, how far it is, and, once a connection is lost, that it is still there: who does not answer that roll call is
the one that is missing. gloo and NCCL themselves only say that somebody was.

Everything here is best effort. Where rank 0 itself is gone, the line is gone, and that is what is reported.
"""

import threading
import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from lora_trainer.errors import PeerLostError
from lora_trainer.settings import Place, rendezvous_address, rendezvous_seconds
from lora_trainer.stop import StopRequest

ROLL_CALL_SECONDS = 3.0
"""How long a process waits for the others to say that they lost a peer too. They do when the connection closes, or when
their own collective operation times out, which began at about the same time."""

FAREWELL_SECONDS = 1.0
"""How long a process that leaves waits for rank 0 to be reached, and then for the others to have heard of it."""

_LOST = (RuntimeError, ValueError)
"""What a TCPStore raises (torch 2.13): DistError is a RuntimeError."""


class Line:
    """This process's end of the line. For a process alone, all calls do nothing."""

    def __init__(self, place: Place, stop: StopRequest) -> None:
        self._place, self._stop = place, stop
        self._server: dist.TCPStore | None = None
        self._voice: dist.TCPStore | None = None
        self._problem: BaseException | None = None
        self._connected = threading.Event()
        self._others = [rank for rank in range(place.world_size) if rank != place.rank]
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)

    def open(self) -> None:
        """Connects in the background: rank 0's pod may start much later than this one."""
        if self._others:
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
        """Says that this process begins ``step``."""
        self._set(f"beat/{self._place.rank}", f"{step} {time.time()}")

    def announce_stop(self) -> None:
        """Tells the others that this process was asked to stop."""
        self._set("stop", str(self._place.rank))

    def announce_failure(self, what: str) -> None:
        """Tells the others that this process ends with ``what``; those that wait for it while they load end too."""
        if self._others:
            self._connected.wait(FAREWELL_SECONDS)
        self._set("stop", f"{self._place.rank}, which failed ({what})")
        self._missing("left", FAREWELL_SECONDS, self._others)

    def leave(self) -> None:
        """Tells the others that this process stops and leaves; waits for them to have heard it, but not long."""
        if self._others:
            self._connected.wait(FAREWELL_SECONDS)
        self.announce_stop()
        self._set(f"left/{self._place.rank}", "")
        self._missing("left", FAREWELL_SECONDS, self._others)

    def explain(self, problem: str) -> str:
        """``problem``, a lost connection, with the ranks that do not answer, and where they were seen last."""
        if self._voice is None:
            return problem
        self._set(f"lost/{self._place.rank}", "")
        if self._place.rank != 0 and self._missing("lost", 1.0, [self._place.rank]):
            return f"rank 0 does not answer. {problem}"
        missing = self._missing("lost", ROLL_CALL_SECONDS, self._others)
        words = [self._last_seen(rank) for rank in missing]
        if self._place.rank == 0:  # it holds the line: the others need a moment to read it too
            self._set("said/0", "")
            self._missing("said", FAREWELL_SECONDS, [rank for rank in self._others if rank not in missing])
        else:
            self._set(f"said/{self._place.rank}", "")
        return "; ".join(words) + f". {problem}" if words else problem

    def _last_seen(self, rank: int) -> str:
        text = f"rank {rank} does not answer"
        if self._missing("beat", 0.5, [rank]):
            return f"{text}; it had not begun to train"
        try:
            assert self._voice is not None  # noqa: S101 - for the type checker
            step, _, at = self._voice.get(f"beat/{rank}").decode().partition(" ")
        except _LOST:
            return text
        return f"{text}; it was last seen at the start of step {step}, {time.time() - float(at):.0f} s ago"

    def _missing(self, key: str, seconds: float, ranks: Iterable[int]) -> list[int]:
        """Which of ``ranks`` did not set their ``key`` within ``seconds``."""
        deadline = time.monotonic() + seconds
        missing = []
        for rank in ranks:
            left = max(0.05, deadline - time.monotonic())
            try:
                if self._voice is None:
                    return list(ranks)
                self._voice.wait([f"{key}/{rank}"], timedelta(seconds=left))
            except _LOST:
                missing.append(rank)
        return missing

    def _set(self, key: str, value: str) -> None:
        if self._voice is None:
            return
        try:
            self._voice.set(key, value)
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
            ear, self._voice = server.clone(), server.clone()
            self._server = server
            self._connected.set()
        except (*_LOST, OSError) as error:
            self._problem = error
            return
        if self._stop.requested:
            self.announce_stop()
        while True:
            try:
                ear.wait(["stop"], timedelta(hours=1))
                self._stop.request(f"rank {ear.get('stop').decode()}")
            except dist.DistStoreError:
                continue
            except _LOST:
                return
            return

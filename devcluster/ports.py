"""Give out TCP ports that no one else takes, although they are bound only later."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

from devcluster.progress import DevclusterError

# Below the ephemeral range (32768 and up), so that no outgoing connection sits on one.
_RANGE = range(20000, 30000)
_TRIES = 200


class PortLease:
    """A port of 127.0.0.1 that other leases leave alone until this one is released.

    A server that is killed and restarted gets the same port back, which a bare
    bind-to-0-and-close cannot promise when several control planes run side by side.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir()) / f"devcluster-ports-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        for port in random.sample(_RANGE, _TRIES):
            lock = (folder / str(port)).open("a")
            if self._locked(lock) and self._free(port):
                self.port, self._lock = port, lock
                return
            lock.close()
        raise DevclusterError(f"no free port found among {_RANGE.start}-{_RANGE.stop - 1} of 127.0.0.1")

    @staticmethod
    def _locked(lock: IO[str]) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def _free(port: int) -> bool:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    def release(self) -> None:
        """Let others have the port."""
        self._lock.close()

"""Speak with a supervisor: start processes, stop them, and say what became of them."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from devcluster.progress import DevclusterError, wait_for

SCRIPT = Path(__file__).with_name("supervisor.py")
_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Service:
    """A process to run: its name, its command, and what is added to its environment."""

    name: str
    argv: Sequence[str | Path]
    env: Mapping[str, str] | None = None


class Supervision:
    """The near end of a supervisor's socket. Logs go to ``<logs>/<name>.log``."""

    def __init__(self, connection: socket.socket, logs: Path) -> None:
        connection.settimeout(_ANSWER_SECONDS)
        self._connection = connection
        self._reader = connection.makefile("rb")
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    @classmethod
    def at(cls, path: Path, logs: Path) -> Self:
        """Connect to a supervisor that listens at ``path``; raises OSError where none does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            raise
        return cls(connection, logs)

    def close(self) -> None:
        """Hang up; a supervisor that lives by this connection ends."""
        self._reader.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        line = self._reader.readline()
        if not line:
            raise DevclusterError("the supervisor of the cluster is gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DevclusterError(f"supervisor: {request['op']} {request.get('name', '')}: {answer['error']}")
        return answer

    def log(self, name: str) -> Path:
        """Return where a process writes."""
        return self.logs / f"{name}.log"

    def start(self, service: Service) -> int:
        """Start a process; return its pid, as the supervisor's process namespace counts."""
        answer = self._ask(
            op="start",
            name=service.name,
            argv=[str(word) for word in service.argv],
            env=dict(service.env or {}),
            log=str(self.log(service.name)),
        )
        return int(answer["pid"])

    def start_again(self, name: str) -> int:
        """Start a process that has ended as it was started the last time; return its pid."""
        return int(self._ask(op="again", name=name)["pid"])

    def stop(self, name: str, *, kill: bool = False, grace: float = 20) -> None:
        """End a process and wait for it: SIGTERM and, after ``grace`` s, SIGKILL; or SIGKILL at once."""
        self._ask(op="stop", name=name, number=int(signal.SIGKILL if kill else signal.SIGTERM), grace=grace)

    def children(self) -> dict[str, dict[str, int | None]]:
        """Return name -> {"pid", "exit"}; ``exit`` is None while the process runs."""
        children: dict[str, dict[str, int | None]] = self._ask(op="status")["children"]
        return children

    def wait_until_up(
        self, name: str, probe: Callable[[], bool], timeout: float = 30, *, restart: bool = False
    ) -> None:
        """Wait until ``probe`` holds; fail at once, with the log's tail, when the process ends.

        With ``restart`` it is started again instead, as an init system would: a kubelet ends
        when its containerd listens already but is not ready.
        """

        def failed() -> str | None:
            code = self.children()[name]["exit"]
            if code is not None and restart:
                self.start_again(name)
                return None
            return None if code is None else f"it ended with exit code {code}"

        wait_for(name, probe, timeout, log=self.log(name), failed=failed)


class LocalSupervisor:
    """A supervisor that lives as long as this process at most, and then leaves nothing."""

    def __init__(self, logs: Path, remove: Path | None) -> None:
        near, far = socket.socketpair()
        with far:
            argv = [sys.executable, "-I", str(SCRIPT), "--fd", str(far.fileno())]
            if remove is not None:
                argv += ["--remove", str(remove)]
            self._process = subprocess.Popen(argv, pass_fds=[far.fileno()], start_new_session=True)
        self.processes = Supervision(near, logs)

    def end(self) -> None:
        """End it and every process that it started, and wait for that."""
        self.processes.close()
        self._process.wait(timeout=30)

"""Start, watch and end the processes of one cluster.

Run by its path as a process of its own, standard library only. It is spoken to with one
JSON object a line (``start``, ``again``, ``stop``, ``status``) and has two lives:

``--fd N``       speaks on an inherited socket, and ends with the process that started it,
                 however that dies: then every child is killed and ``--remove`` deleted.
``--listen DIR`` speaks on the Unix socket DIR/supervisor.sock; it is the init of a cluster's
                 process namespace, so the kernel ends everything in it when it ends.
"""

import argparse
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Supervisor:
    """The children, by name. A name can be started again after its process has ended."""

    def __init__(self) -> None:
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self._known: dict[str, tuple[list[str], str, dict[str, str]]] = {}

    def start(self, name: str, argv: list[str], log: str, env: dict[str, str]) -> int:
        """Start a process under a name; return its pid."""
        running = self.children.get(name)
        if running is not None and running.returncode is None:
            raise ValueError(f"{name} is running already")
        with Path(log).open("ab") as output:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.children[name] = child
        self._known[name] = (argv, log, env)
        return child.pid

    def again(self, name: str) -> int:
        """Start a process that has ended as it was started the last time."""
        return self.start(name, *self._known[name])

    def reap(self) -> None:
        """Collect every child that has ended, the orphans that an init inherits included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self.children.values():
                if child.pid == pid:
                    child.returncode = os.waitstatus_to_exitcode(status)

    def stop(self, name: str, number: int, grace: float) -> None:
        """Send a signal, and SIGKILL if the process is still there after ``grace`` seconds."""
        child = self.children[name]
        self.reap()
        deadline = time.monotonic() + grace
        if child.returncode is None:
            os.kill(child.pid, number)
        while child.returncode is None:
            if time.monotonic() > deadline:
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.005)
            self.reap()

    def end(self) -> None:
        """Kill every child and wait for each."""
        for child in reversed(self.children.values()):
            if child.returncode is None:
                os.kill(child.pid, signal.SIGKILL)
        for name in self.children:
            self.stop(name, signal.SIGKILL, 10)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request."""
        operation = request.pop("op")
        if operation == "start":
            return {"pid": self.start(**request)}
        if operation == "again":
            return {"pid": self.again(**request)}
        if operation == "stop":
            self.stop(**request)
            return {}
        self.reap()
        return {
            "children": {name: {"pid": child.pid, "exit": child.returncode} for name, child in self.children.items()}
        }


class _Channel:
    """One connection: requests come in as lines, each is answered by one line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""

    def serve(self, supervisor: Supervisor) -> bool:
        """Answer what has arrived; return whether the other side is still there."""
        try:
            data = self.connection.recv(65536)
        except ConnectionError:
            return False
        self.buffer += data
        while b"\n" in self.buffer:
            line, self.buffer = self.buffer.split(b"\n", 1)
            try:
                reply = supervisor.answer(json.loads(line))
            except (OSError, ValueError, LookupError, TypeError) as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            try:
                self.connection.sendall(json.dumps(reply).encode() + b"\n")
            except ConnectionError:
                return False
        return bool(data)


def _serve(supervisor: Supervisor, selector: selectors.BaseSelector, lifeline: bool) -> None:
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector.register(wake_read, selectors.EVENT_READ, "child")
    while True:
        for key, _ in selector.select():
            if key.data == "child":
                os.read(wake_read, 4096)
                supervisor.reap()
            elif key.data == "parent":
                return
            elif key.data == "listener":
                assert isinstance(key.fileobj, socket.socket)
                connection, _address = key.fileobj.accept()
                selector.register(connection, selectors.EVENT_READ, _Channel(connection))
            elif not key.data.serve(supervisor):
                if lifeline:
                    return
                selector.unregister(key.fileobj)
                key.data.connection.close()


def main() -> int:
    """Serve until the parent or the connection is gone, or for ever."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--listen")
    parser.add_argument("--remove")
    options = parser.parse_args()
    supervisor = Supervisor()
    selector = selectors.DefaultSelector()
    if options.listen:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # From inside its folder: the path of a socket may have 107 bytes at most.
        os.chdir(options.listen)
        listener.bind("supervisor.sock")
        listener.listen()
        os.chdir("/")
        selector.register(listener, selectors.EVENT_READ, "listener")
    else:
        parent = os.pidfd_open(os.getppid())
        connection = socket.socket(fileno=options.fd)
        connection.set_inheritable(False)
        selector.register(parent, selectors.EVENT_READ, "parent")
        selector.register(connection, selectors.EVENT_READ, _Channel(connection))
    try:
        _serve(supervisor, selector, lifeline=not options.listen)
    finally:
        supervisor.end()
        if options.remove:
            shutil.rmtree(options.remove, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

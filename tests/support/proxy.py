"""A TCP proxy in front of a real store, which a test can make slow, silent or cut off, request by request."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

REQUEST = re.compile(rb"^(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP/1.1\r\n")


class Proxy:
    """Passes connections on to ``target``. ``judge`` says what becomes of a request, by its method and path.

    pass: as it is. hold: it waits until ``release`` is set. swallow: it is never answered. cut: the answer stops in
    the middle of its body, and the connection stays open. drop: the connection is closed.
    """

    def __init__(self, target: int) -> None:
        self.judge: Callable[[str, str], str] = lambda method, path: "pass"
        self.release = threading.Event()
        self.seen: list[tuple[str, str, str]] = []
        self.changed = threading.Condition()
        self._target = target
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Endpoint for clients."""
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, verdict: str, timeout: float = 120) -> None:
        """Returns when a request was judged ``verdict``."""
        with self.changed:
            found = self.changed.wait_for(lambda: any(seen[2] == verdict for seen in self.seen), timeout)
        assert found, f"no request was judged {verdict}: {self.seen[-20:]}"

    def close(self) -> None:
        """Ends all connections."""
        self.release.set()
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                state = {"verdict": "pass"}
                threading.Thread(target=self._requests, args=(client, server, state), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, server, state), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, state: dict[str, str]) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                found = REQUEST.match(data)
                if found:
                    method, path = found[1].decode(), found[2].decode()
                    state["verdict"] = verdict = self.judge(method, path)
                    with self.changed:
                        self.seen.append((method, path, verdict))
                        self.changed.notify_all()
                if state["verdict"] == "hold":
                    self.release.wait()
                if state["verdict"] == "drop":
                    client.shutdown(socket.SHUT_RDWR)
                    return
                if state["verdict"] != "swallow":
                    server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _answers(self, client: socket.socket, server: socket.socket, state: dict[str, str]) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if state["verdict"] == "cut":
                    head, _, body = data.partition(b"\r\n\r\n")
                    data = head + b"\r\n\r\n" + body[: len(body) // 2]
                    client.sendall(data)
                    return
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_WR)


@contextmanager
def run_proxy(target: int) -> Iterator[Proxy]:
    """A proxy in front of the port ``target`` of this machine."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()

"""The operator inside the test's process, in a thread with an event loop of its own, and ways to cut it short."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from typing import Any

from lora_operator.app import Operator, utc_now
from lora_operator.kube import KubeClient, KubeError
from lora_operator.settings import Settings


class RecordingClient(KubeClient):
    """Keeps a list of all calls, serves logs from a dictionary (there is no kubelet), and can be cut.

    ``cut_after`` calls have reached the API server, nothing more happens in this operator: the answer of the last one
    is never seen, as if the process had been killed.
    """

    logs: dict[str, str]
    calls: list[str]
    answered: list[str]
    cut_after: int | None

    async def _send(self, method: Any, path: str, query: Any, body: Any, content_type: str, accept: str) -> Any:
        if self.cut_after is not None and len(self.calls) >= self.cut_after:
            await asyncio.get_running_loop().create_future()
        self.calls.append(f"{method} {path}")
        if path.endswith("/log"):
            answer = self._answer_log(path.split("/")[-2])
        else:
            answer = await super()._send(method, path, query, body, content_type, accept)
        self.answered.append(path)
        if self.cut_after is not None and len(self.calls) >= self.cut_after:
            await asyncio.get_running_loop().create_future()
        return answer

    def _answer_log(self, pod: str) -> tuple[int, None, bytes]:
        text = next((text for name, text in self.logs.items() if pod.startswith(name)), None)
        return (400, None, b'{"message":"no log"}') if text is None else (200, None, text.encode())


class OperatorThread:
    """A running operator. Use as a context manager, or start and stop by hand."""

    def __init__(
        self,
        settings: Settings,
        *,
        cut_after: int | None = None,
        logs: dict[str, str] | None = None,
        wrap: Callable[[KubeClient], None] = lambda client: None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.calls: list[str] = []
        self._answered: list[str] = []
        self.logs = {} if logs is None else logs
        self._cut_after = cut_after
        self._wrap = wrap
        self.operator = Operator(settings, make_client=self._make_client, clock=clock)
        if cut_after is not None:
            self.operator.drain_seconds = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._done: Future[None] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> "OperatorThread":
        self._thread.start()
        return self

    @property
    def is_cut(self) -> bool:
        """Whether the API server has done all that it is to be asked: one that is cut off earlier may not do it."""
        return self._cut_after is not None and len(self._answered) >= self._cut_after

    def stop(self) -> None:
        """Ends it at once, wherever it is."""
        if self._loop is not None and self._task is not None and not self._done.done():
            self._loop.call_soon_threadsafe(self._stop.set if self.operator.ready else self._task.cancel)
        self._done.result(timeout=30)
        self._thread.join(timeout=30)

    def __enter__(self) -> "OperatorThread":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make_client(self, *args: Any) -> KubeClient:
        client = RecordingClient(*args)
        client.calls, client.cut_after, client.logs = self.calls, self._cut_after, self.logs
        client.answered = self._answered
        self._wrap(client)
        return client

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._main())
        except asyncio.CancelledError:
            self._done.set_result(None)
        except BaseException as error:
            self._done.set_exception(error)
            raise
        else:
            self._done.set_result(None)

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await self.operator.run(self._stop)
        finally:
            await _wait_for_closed_connections(self._loop)


async def _wait_for_closed_connections(loop: Any) -> None:
    """TLS connections say goodbye after they were closed; a loop that ends before leaves open sockets behind."""
    async with asyncio.timeout(10):
        while len(loop._selector.get_map()) > 1:  # noqa: ASYNC110  (1: the loop's own pipe; it tells nobody)
            await asyncio.sleep(0.01)


__all__ = ["KubeError", "OperatorThread", "RecordingClient"]

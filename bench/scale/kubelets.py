"""What the API server asks of kubelets: the logs of pods. Some answer, some hang, some are not there any more."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from devcluster.pki import Authority

ADDRESS = "127.0.0.1"
"""Where all nodes are."""


@asynccontextmanager
async def run_kubelets(authority: Authority, read_log: Callable[[str, str], str | None]) -> AsyncIterator[int]:
    """Serves what ``read_log`` says of a namespace and a pod, ``None`` for one that is not there; yields the port."""

    async def handle(request: web.Request) -> web.Response:
        log = read_log(request.match_info["namespace"], request.match_info["pod"])
        return web.Response(status=404) if log is None else web.Response(text=log)

    async with _serve(authority, "played-kubelets", handle) as port:
        yield port


@asynccontextmanager
async def run_hung_kubelets(authority: Authority) -> AsyncIterator[int]:
    """Takes every request and answers none, as a kubelet does whose container runtime hangs; yields the port."""

    async def handle(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with _serve(authority, "hung-kubelets", handle) as port:
        yield port


@contextmanager
def run_dead_kubelets() -> Iterator[int]:
    """A port at which no connection is ever made and none refused, as of a node without power; yields it.

    The queue of a socket that accepts nothing is full, and the kernel drops what else comes.
    """
    with socket.socket() as listening:
        listening.bind((ADDRESS, 0))
        listening.listen(0)
        port: int = listening.getsockname()[1]
        fillers = [socket.socket() for _ in range(2)]
        try:
            for filler in fillers:
                filler.settimeout(0)
                filler.connect_ex((ADDRESS, port))
            yield port
        finally:
            for filler in fillers:
                filler.close()


@asynccontextmanager
async def _serve(
    authority: Authority, name: str, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncIterator[int]:
    pair = authority.issue(name, "system:nodes", hosts=[ADDRESS])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.certificate, pair.key)
    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, ADDRESS, 0, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

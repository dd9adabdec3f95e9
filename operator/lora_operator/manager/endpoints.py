"""/healthz, /readyz and /metrics, on one port.

The first two are for the kubelet, which has no token: they say one word, and nothing of what the operator works on.
"""

import errno
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lora_operator.manager.app import Operator
from lora_operator.manager.gate import ALLOWED, PATH, Gate

logger = logging.getLogger(__name__)

_BACKLOG = 128


def listen_everywhere(port: int) -> socket.socket:
    """A socket on every address: of IPv6, where a cluster may have no other, and of IPv4.

    A machine without IPv6 gets one of IPv4 alone.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            logger.info("no IPv6 to listen on: %s", error)
    return socket.create_server(("", port), backlog=_BACKLOG)


@asynccontextmanager
async def serve(operator: Operator, gate: Gate | None, host: str, port: int) -> AsyncIterator[int]:
    """Answers for ``operator`` while the block runs, metrics to those whom ``gate`` lets through.

    Gives the port, which is a free one where 0 was asked for.
    """

    async def healthz(_: web.Request) -> web.Response:
        trouble = operator.healthy()
        if trouble:
            logger.error("unhealthy: %s", trouble)
        # Not for one that cannot be read: a new process could not either, and all others would wait for it.
        well = "ok, but not in every namespace, see the log\n" if operator.refused.names() else "ok\n"
        return web.Response(text="stuck, see the log\n" if trouble else well, status=503 if trouble else 200)

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n" if operator.ready else "starting\n", status=200 if operator.ready else 503)

    async def metrics(request: web.Request) -> web.Response:
        verdict = await gate.check(request.headers.get("Authorization")) if gate else ALLOWED
        if verdict is not ALLOWED:
            headers = {"WWW-Authenticate": "Bearer"} if verdict.status == 401 else {}
            return web.Response(text=f"{verdict.why}\n", status=verdict.status, headers=headers)
        body = generate_latest(operator.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get(PATH, metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port) if host else web.SockSite(runner, listen_everywhere(port))
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

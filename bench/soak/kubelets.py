"""What the API server asks of kubelets: the logs of pods."""

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

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

    pair = authority.issue("played-kubelets", "system:nodes", hosts=[ADDRESS])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.certificate, pair.key)
    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, ADDRESS, 0, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

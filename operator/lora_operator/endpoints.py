"""/healthz, /readyz and /metrics, on one port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lora_operator.app import Operator


@asynccontextmanager
async def serve(operator: Operator, host: str, port: int) -> AsyncIterator[int]:
    """Answers for ``operator`` while the block runs; gives the port, which is a free one where 0 was asked for."""

    async def healthz(_: web.Request) -> web.Response:
        trouble = operator.healthy()
        return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n" if operator.ready else "starting\n", status=200 if operator.ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(operator.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

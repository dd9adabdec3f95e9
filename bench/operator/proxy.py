"""A proxy in front of the API server that asks for patience (429) and is slow, at random but the same each time."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from yarl import URL

from bench.operator.client import Client

_HOP = ("connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive", "host")


@dataclass(frozen=True)
class Trouble:
    """Shares of the requests that are refused with 429 and Retry-After, and of those whose answers come late."""

    refused: float = 0.05
    late: float = 0.1
    retry_after: int = 1
    delay: tuple[float, float] = (0.5, 3.0)


class Proxy:
    """Passes requests on as they are, as the user of ``client``."""

    def __init__(self, client: Client, trouble: Trouble, seed: int) -> None:
        self._client = client
        self._trouble = trouble
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one request."""
        chance = self._random.random()
        if chance < self._trouble.refused:
            self.counts["refused"] += 1
            body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 429, "message": "too many"}
            return web.json_response(body, status=429, headers={"Retry-After": str(self._trouble.retry_after)})
        late = chance < self._trouble.refused + self._trouble.late
        self.counts["late" if late else "passed"] += 1
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        url = URL(request.raw_path, encoded=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._client.session.request(
            request.method, url, data=await request.read() or None, headers=headers, timeout=timeout
        ) as answer:
            if late:
                await asyncio.sleep(self._random.uniform(*self._trouble.delay))
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            with suppress(ConnectionError):  # who asked has ended, or lost patience
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            return response


@asynccontextmanager
async def run_proxy(client: Client, trouble: Trouble, seed: int = 7) -> AsyncIterator[Proxy]:
    """A proxy for the length of the block, on a free port of 127.0.0.1, without TLS."""
    proxy = Proxy(client, trouble, seed)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.port = runner.addresses[0][1]
        yield proxy
    finally:
        await runner.cleanup()


def write_kubeconfig(path: Path, port: int) -> Path:
    """A kubeconfig for the proxy, which asks for no credentials."""
    path.write_text(
        f"""apiVersion: v1
kind: Config
current-context: proxy
clusters: [{{name: proxy, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: proxy, user: {{}}}}]
contexts: [{{name: proxy, context: {{cluster: proxy, user: proxy}}}}]
"""
    )
    return path

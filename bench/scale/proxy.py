"""A proxy in front of the API server that refuses, is slow, or loses answers, at random but the same each time."""

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

from bench.scale.client import Client

_HOP = ("connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive", "host")


@dataclass(frozen=True)
class Trouble:
    """Shares of the requests by what befalls them.

    refused: answered with 429 and Retry-After. unavailable: with 503. lost: done, but the connection is closed before
    the answer. late: answered after ``delay`` seconds.
    """

    refused: float = 0.05
    late: float = 0.1
    unavailable: float = 0.0
    lost: float = 0.0
    retry_after: int = 1
    delay: tuple[float, float] = (0.5, 3.0)

    def draw(self, chance: float) -> str:
        """What befalls a request, by a number from 0 to 1."""
        for name in ("refused", "late", "unavailable", "lost"):
            share: float = getattr(self, name)
            if chance < share:
                return name
            chance -= share
        return "passed"


CALM = Trouble(refused=0.0, late=0.0)


@dataclass(frozen=True)
class Write:
    """A request that changes something."""

    method: str
    path: str
    content_type: str
    body: str


class Proxy:
    """Passes requests on as they are, as the user of ``client``. ``trouble`` may be changed at any time."""

    def __init__(self, client: Client, trouble: Trouble, seed: int) -> None:
        self._client = client
        self.trouble = trouble
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.writes: list[Write] | None = None
        """Where there is a list, writes are put down in it."""
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one request."""
        trouble, fate = self.trouble, self.trouble.draw(self._random.random())
        self.counts[fate] += 1
        if self.writes is not None and request.method in ("POST", "PATCH", "PUT"):
            write = Write(request.method, request.raw_path, request.headers["Content-Type"], await request.text())
            self.writes.append(write)
        if fate in ("refused", "unavailable"):
            code, after = (429, {"Retry-After": str(trouble.retry_after)}) if fate == "refused" else (503, {})
            body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": fate}
            return web.json_response(body, status=code, headers=after)
        with suppress(aiohttp.ClientError, ConnectionError):  # either end has gone
            return await self._pass_on(request, fate, trouble)
        return _hang_up(request)

    async def _pass_on(self, request: web.Request, fate: str, trouble: Trouble) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        url = URL(request.raw_path, encoded=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._client.session.request(
            request.method, url, data=await request.read() or None, headers=headers, timeout=timeout
        ) as answer:
            if fate == "lost":
                return _hang_up(request)
            if fate == "late":
                await asyncio.sleep(self._random.uniform(*trouble.delay))
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response


def _hang_up(request: web.Request) -> web.StreamResponse:
    """Closes the connection without an answer, as a server that is killed does."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=502)


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

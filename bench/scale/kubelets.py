"""What the API server asks of kubelets: the logs of pods. Some answer, some hang, some are not there any more.

A webhook that puts things into new pods can be served beside them.
"""

import asyncio
import base64
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from bench.scale.client import Raw
from devcluster.pki import Authority
from lora_api.run import CONTAINER_NAME

ADDRESS = "127.0.0.1"
"""Where all nodes are, and the webhook."""

INJECT = "/inject"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def run_kubelets(
    authority: Authority,
    read_log: Callable[[str, str], str | None],
    inject: Callable[[Raw], list[Raw]] = lambda pod: [],
) -> AsyncIterator[int]:
    """Serves what ``read_log`` says of a namespace and a pod, ``None`` for one that is not there; yields the port.

    The same port is that of a webhook, which answers with the JSON patch that ``inject`` makes of a pod.
    """

    async def handle(request: web.Request) -> web.Response:
        log = read_log(request.match_info["namespace"], request.match_info["pod"])
        if request.match_info["container"] != CONTAINER_NAME:
            log = "[info] a sidecar speaks of other things\n"
        return web.Response(status=404) if log is None else web.Response(text=log)

    async def review(request: web.Request) -> web.Response:
        asked = (await request.json())["request"]
        patch = base64.b64encode(json.dumps(inject(asked["object"])).encode()).decode()
        answer = {"uid": asked["uid"], "allowed": True, "patchType": "JSONPatch", "patch": patch}
        return web.json_response({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer})

    async with _serve(authority, "played-kubelets", handle, review) as port:
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
async def _serve(authority: Authority, name: str, handle: Handler, review: Handler | None = None) -> AsyncIterator[int]:
    pair = authority.issue(name, "system:nodes", hosts=[ADDRESS])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.certificate, pair.key)
    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", handle)
    if review is not None:
        app.router.add_post(INJECT, review)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, ADDRESS, 0, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

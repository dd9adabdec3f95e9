"""What the API server asks of others: the logs of pods of kubelets, and what to put into new pods of a webhook."""

import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from bench.scale.client import Raw
from devcluster.pki import Authority
from lora_api.run import CONTAINER_NAME

ADDRESS = "127.0.0.1"
"""Where all nodes are, and the webhook."""

INJECT = "/inject"


@asynccontextmanager
async def run_kubelets(
    authority: Authority, read_log: Callable[[str, str], str | None], inject: Callable[[Raw], list[Raw]]
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

    pair = authority.issue("played-kubelets", "system:nodes", hosts=[ADDRESS])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.certificate, pair.key)
    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", handle)
    app.router.add_post(INJECT, review)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, ADDRESS, 0, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

"""The bench's own client: many calls at once."""

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp

from devcluster import ControlPlane
from devcluster.pki import Pair

Raw = dict[str, Any]
T = TypeVar("T")

RUNS = "/apis/lorafinetune.io/v1alpha1/namespaces/{}/lorafinetunes"
JOBS = "/apis/batch/v1/namespaces/{}/jobs"
PODS = "/api/v1/namespaces/{}/pods"
JSON = "application/json"
MERGE = "application/merge-patch+json"


class BenchError(Exception):
    """The bench could not do what it had to."""


class RefusedError(BenchError):
    """The API server refused a call, with the HTTP status ``status``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Access:
    """An API server, and as whom to call it."""

    url: str
    authority: Path
    user: Pair


def access_to(plane: ControlPlane, user: Pair | None = None) -> Access:
    """Access to ``plane`` as ``user``, or as an administrator."""
    return Access(plane.url, plane.ca, user or plane.files.admin)


class Client:
    """Raw JSON over aiohttp. Use as an asynchronous context manager."""

    def __init__(self, access: Access) -> None:
        self._tls = ssl.create_default_context(cafile=str(access.authority))
        self._tls.load_cert_chain(access.user.certificate, access.user.key)
        self._access = access

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(
            self._access.url,
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=0),
            headers={"User-Agent": "bench"},
            timeout=aiohttp.ClientTimeout(total=60),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    def as_user(self, user: Pair) -> "Client":
        """Another client, as ``user``."""
        return Client(replace(self._access, user=user))

    async def call(self, method: str, path: str, body: Raw | None = None, content_type: str = JSON) -> Raw:
        """One call.

        Raises:
            RefusedError: it was refused.
        """
        result: Raw = json.loads(
            await self.send(method, path, None if body is None else json.dumps(body), content_type)
        )
        return result

    async def send(self, method: str, path: str, data: str | None, content_type: str) -> str:
        """One call with text for its body, and the text of the answer.

        Raises:
            RefusedError: it was refused.
        """
        async with self.session.request(method, path, data=data, headers={"Content-Type": content_type}) as answer:
            text = await answer.text()
            if answer.status >= 400:
                raise RefusedError(answer.status, f"{method} {path}: {answer.status}: {text[:500]}")
            return text

    async def set_status(self, path: str, status: Raw) -> None:
        """Writes a part of an object's status."""
        await self.call("PATCH", f"{path}/status", {"status": status}, MERGE)

    async def newest(self, path: str) -> str:
        """The version of a list now, to watch from."""
        return str((await self.call("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"])

    async def watch(self, path: str, selector: str, version: str) -> AsyncIterator[tuple[str, Raw]]:
        """Type and object of every change after ``version``; goes on where a connection ends."""
        while True:
            query = f"?watch=true&labelSelector={selector}&resourceVersion={version}&timeoutSeconds=600"
            async with self.session.get(path + query, timeout=aiohttp.ClientTimeout(total=None)) as answer:
                if answer.status >= 400:
                    raise BenchError(f"watch {path}: {answer.status}: {(await answer.text())[:500]}")
                async for event in _documents(answer.content):
                    version = event["object"]["metadata"]["resourceVersion"]
                    yield event["type"], event["object"]


class EtcdClient:
    """Writes to etcd behind the API server's back. Use as an asynchronous context manager."""

    def __init__(self, plane: ControlPlane) -> None:
        self._url = plane.etcd_url
        self._tls = ssl.create_default_context(cafile=str(plane.files.etcd_authority))
        self._tls.load_cert_chain(plane.files.etcd_client.certificate, plane.files.etcd_client.key)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(self._url, connector=aiohttp.TCPConnector(ssl=self._tls))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def put(self, writes: Iterable[tuple[str, str]]) -> None:
        """Writes keys and values in one transaction.

        Raises:
            BenchError: it was refused.
        """
        puts = [{"requestPut": {"key": _encode(key), "value": _encode(value)}} for key, value in writes]
        async with self._session.post("/v3/kv/txn", json={"success": puts}) as answer:
            if answer.status != 200:
                raise BenchError(f"etcd: {answer.status}: {(await answer.text())[:500]}")


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def _documents(stream: aiohttp.StreamReader) -> AsyncIterator[Raw]:
    """The lines of a watch, however long they are."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


async def run_all(items: Iterable[T], work: Callable[[T], Awaitable[object]], at_once: int) -> None:
    """``work`` on every item, ``at_once`` of them at a time; the first error ends it."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())

"""Kubelets that are played: the API server has to find them as it finds real ones."""

import asyncio
import socket
import ssl
from pathlib import Path

import aiohttp
import pytest

from bench.scale.kubelets import ADDRESS, run_dead_kubelets, run_hung_kubelets, run_kubelets
from devcluster.pki import Authority


async def fetch(authority: Authority, port: int, pod: str, seconds: float) -> tuple[int, str]:
    tls = ssl.create_default_context(cafile=str(authority.certificate))
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=tls)) as session:
        url = f"https://{ADDRESS}:{port}/containerLogs/team/{pod}/trainer?tailLines=200"
        async with session.get(url) as answer:
            return answer.status, await answer.text()


def test_a_kubelet_gives_the_log_of_a_pod_that_it_has(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")

    async def ask() -> list[tuple[int, str]]:
        logs = {("team", "here"): "a line\n"}
        async with run_kubelets(authority, lambda namespace, pod: logs.get((namespace, pod))) as port:
            return [await fetch(authority, port, pod, 30) for pod in ("here", "gone")]

    (status, text), (missing, _) = asyncio.run(ask())
    assert (status, text, missing) == (200, "a line\n", 404)


def test_one_that_hangs_takes_a_request_and_never_answers(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")

    async def ask() -> None:
        async with run_hung_kubelets(authority) as port:
            await fetch(authority, port, "here", 0.5)

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(ask())
    assert not isinstance(caught.value, aiohttp.ConnectionTimeoutError), "the connection was made"


def test_one_without_power_takes_no_connection_and_refuses_none() -> None:
    with run_dead_kubelets() as port, pytest.raises(TimeoutError):
        socket.create_connection((ADDRESS, port), timeout=0.3)

"""Where the operator listens, and what it says to the kubelet."""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from lora_operator.manager.app import Operator
from lora_operator.manager.endpoints import listen_everywhere, serve
from lora_operator.settings import Settings


def ask(path: str, hosts: list[str], operator: Operator | None = None, listen: str = "") -> list[str]:
    """What is answered on each of ``hosts``; "no" where nobody is."""

    async def main() -> list[str]:
        answers = []
        async with (
            serve(operator or Operator(Settings()), None, listen, 0) as port,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        ):
            for host in hosts:
                try:
                    async with session.get(f"http://{host}:{port}{path}") as answer:
                        answers.append(f"{answer.status} {await answer.text()}".strip())
                except aiohttp.ClientConnectionError:
                    answers.append("no")
        return answers

    return asyncio.run(main())


def test_it_listens_on_ipv6_and_on_ipv4() -> None:
    """A cluster may have either alone, and its probes come from outside the pod."""
    assert ask("/healthz", ["[::1]", "127.0.0.1"]) == ["200 ok", "200 ok"]


@pytest.mark.parametrize(
    ("address", "want"), [("127.0.0.1", ["no", "200 ok"]), ("::1", ["200 ok", "no"]), ("0.0.0.0", ["no", "200 ok"])]
)
def test_or_where_it_is_told_to(address: str, want: list[str]) -> None:
    assert ask("/healthz", ["[::1]", "127.0.0.1"], listen=address) == want


def without_ipv6(*_: Any, **options: Any) -> socket.socket:
    """A kernel that knows IPv6, on a machine that has none."""
    if options.get("family") == socket.AF_INET6:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
    return real_create_server(("127.0.0.1", 0))


real_create_server: Callable[..., socket.socket] = socket.create_server


@pytest.mark.parametrize("dual", [True, False], ids=["no address", "no support"])
def test_without_ipv6_it_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch, *, dual: bool) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: dual)
    monkeypatch.setattr(socket, "create_server", without_ipv6)
    with listen_everywhere(0) as found:
        assert found.family == socket.AF_INET


def test_a_port_that_is_taken_is_an_error() -> None:
    with listen_everywhere(0) as first, pytest.raises(OSError, match="in use"):
        listen_everywhere(first.getsockname()[1])


def test_the_kubelet_is_told_that_not_all_is_well_and_starts_nothing_anew() -> None:
    """Another process could not read that namespace either, and the runs of all others would wait for it."""
    operator = Operator(Settings(namespaces=("a", "b")))
    operator.refused.refuse("b", "no")
    assert ask("/healthz", ["127.0.0.1"], operator) == ["200 ok, but not in every namespace, see the log"]
    assert 'lora_operator_namespace_refused{namespace="b"} 1.0' in ask("/metrics", ["127.0.0.1"], operator)[0]
    operator.refused.serve("b")
    assert ask("/healthz", ["127.0.0.1"], operator) == ["200 ok"]
    assert "lora_operator_namespace_refused{" not in ask("/metrics", ["127.0.0.1"], operator)[0]

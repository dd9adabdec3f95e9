"""A namespace that may not be read: what is made of the API server's answers to kopf."""

import asyncio
import logging
from typing import Any, cast

import aiohttp
import pytest
from yarl import URL

from lora_operator.watched.refused import Refused

NO = '{"message": "pods is forbidden: User \\"operator\\" cannot list resource \\"pods\\""}'


class Answer:
    def __init__(self, path: str, status: int, text: str = NO) -> None:
        self.url, self.status, self._text = URL(f"https://api{path}"), status, text

    async def text(self) -> str:
        return self._text


def see(refused: Refused, path: str, status: int, text: str = NO) -> str | None:
    """What kopf is told: an error's words, or nothing."""
    try:
        asyncio.run(refused.check(cast("aiohttp.ClientResponse", Answer(path, status, text))))
    except aiohttp.ClientConnectionError as error:
        return str(error)
    return None


@pytest.fixture
def refused() -> Refused:
    return Refused(("a", "b"), retry_seconds=0.0)


PODS = "/api/v1/namespaces/b/pods"

# A sentence that says the case: an answer of the API server, and whether it is a refusal of a namespace.
ANSWERS: dict[str, tuple[str, int, bool]] = {
    "a list": (f"{PODS}?labelSelector=x", 403, True),
    "a watch": ("/apis/batch/v1/namespaces/b/jobs?watch=true", 403, True),
    "below the path of a proxy": (f"/k8s/clusters/c-1{PODS}", 403, True),
    "an answer": (PODS, 200, False),
    "an API server that is not well": (PODS, 500, False),
    "a login that has ended, which kopf renews": (PODS, 401, False),
    "another namespace": ("/api/v1/namespaces/c/pods", 403, False),
    "the whole cluster": ("/apis/lorafinetune.io/v1alpha1/clusterloraruntimes", 403, False),
    "the namespace itself": ("/api/v1/namespaces/b", 403, False),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_refusal_of_a_namespace_is_a_broken_connection(refused: Refused, case: str) -> None:
    path, status, want = ANSWERS[case]
    told = see(refused, path, status)
    assert (told is not None, "b" in refused, refused.can_be_watched("b")) == (want, want, not want)
    assert "a" not in refused
    if want:
        assert told == 'pods is forbidden: User "operator" cannot list resource "pods"'


def test_it_is_said_once(refused: Refused, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            see(refused, PODS, 403)
        refused.serve("b")
        refused.serve("b")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("namespace b is not served: pods is forbidden: ")
    assert said[1] == "namespace b is served again"


def test_each_list_and_each_watch_has_to_be_allowed_again(refused: Refused) -> None:
    for path in (PODS, f"{PODS}?watch=true"):
        see(refused, path, 403)
    see(refused, PODS, 200)
    assert not refused.can_be_watched("b"), "it may be listed, and not be watched"
    see(refused, f"{PODS}?watch=true", 200)
    assert refused.can_be_watched("b")
    assert refused.names() == ["b"], "until it was read"


@pytest.mark.parametrize("text", ["<html>no</html>", "[]", ""])
def test_a_proxy_may_refuse_in_its_own_words(refused: Refused, text: str) -> None:
    told: Any = see(refused, PODS, 403, text)
    assert told == text

"""Who may read /metrics: what is asked of the API server, how often, and what is answered."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError
from lora_operator.kube.ratelimit import RateLimit
from lora_operator.manager.gate import ALLOWED, Gate, Verdict, Verdicts, parse_token

PROMETHEUS = {
    "username": "system:serviceaccount:monitoring:prometheus",
    "uid": "1",
    "groups": ["system:serviceaccounts"],
    "extra": {"authentication.kubernetes.io/pod-name": ["prometheus-0"]},
}


class Reviewer(KubeClient):
    """An API server that knows the tokens ``good`` (may read) and ``known`` (may not), and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(Configuration(host="http://none"), RateLimit(1e6, 1000), 1.0)
        self.asked: list[tuple[str, Any]] = []
        self.down = False
        self.rights = {PROMETHEUS["username"]}
        self.hold: asyncio.Event | None = None

    async def create_review(self, resource: str, spec: Any) -> Any:
        self.asked.append((resource, spec))
        if self.hold is not None:
            await self.hold.wait()
        if self.down:
            raise KubeError(0, "no answer")
        if resource == "subjectaccessreviews":
            return {"allowed": spec["user"] in self.rights}
        users = {"good": PROMETHEUS, "known": {"username": "somebody"}}
        token = spec["token"]
        return {"authenticated": True, "user": users[token]} if token in users else {"error": "unknown"}


def run(use: Callable[[Gate, Reviewer, list[float]], Awaitable[Any]]) -> Any:
    """``use`` with a gate, its API server, and a clock whose last entry is the time."""

    async def main() -> Any:
        kube, now = Reviewer(), [0.0]
        try:
            return await use(Gate(kube, lambda: now[-1]), kube, now)
        finally:
            await kube.close()

    return asyncio.run(main())


ANSWERS = {
    "a token that may": ("Bearer good", 200, ""),
    "the scheme in other letters": ("bearer good", 200, ""),
    "a token that may not": ("Bearer known", 403, "somebody may not get /metrics: bind the ClusterRole"),
    "a token that nobody knows": ("Bearer x.y.z", 401, "does not know this token"),
    "no header": (None, 401, "a token is needed"),
    "an empty token": ("Bearer ", 401, "a token is needed"),
    "a password": ("Basic Z29vZDpnb29k", 401, "a token is needed"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_answer_says_who_may_and_why_not(case: str) -> None:
    header, status, words = ANSWERS[case]

    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> Verdict:
        return await gate.check(header)

    verdict: Verdict = run(use)
    assert verdict.status == status
    assert words in verdict.why
    assert "\n" not in verdict.why
    assert bool(verdict.why) == (status != 200)


def test_all_that_is_known_of_a_user_is_asked_about() -> None:
    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> Any:
        await gate.check("Bearer good")
        return kube.asked

    assert run(use) == [
        ("tokenreviews", {"token": "good"}),
        (
            "subjectaccessreviews",
            {
                "user": PROMETHEUS["username"],
                "uid": "1",
                "groups": ["system:serviceaccounts"],
                "extra": PROMETHEUS["extra"],
                "nonResourceAttributes": {"path": "/metrics", "verb": "get"},
            },
        ),
    ]


@pytest.mark.parametrize(("token", "calls"), [("good", 2), ("known", 2), ("nobody's", 1)])
def test_a_verdict_is_kept_for_a_minute(token: str, calls: int) -> None:
    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> None:
        first = await gate.check(f"Bearer {token}")
        now.append(59.0)
        assert await gate.check(f"Bearer {token}") is first
        assert len(kube.asked) == calls
        now.append(60.0)
        assert await gate.check(f"Bearer {token}") == first
        assert len(kube.asked) == 2 * calls

    run(use)


def test_the_same_token_many_times_at_once_is_asked_about_as_often_as_there_are_places() -> None:
    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> None:
        assert {await check for check in [gate.check("Bearer good") for _ in range(20)]} == {ALLOWED}
        verdicts = await asyncio.gather(*(gate.check("Bearer known") for _ in range(20)))
        assert {verdict.status for verdict in verdicts} == {403}
        assert len(kube.asked) <= 2 + 2 * 4

    run(use)


def test_an_api_server_that_does_not_answer_lets_nobody_in_and_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> None:
        kube.down = True
        assert (await gate.check("Bearer good")).status == 503
        kube.down = False
        assert await gate.check("Bearer good") is ALLOWED

    run(use)
    assert "no answer" in caplog.text
    assert "good" not in caplog.text


def test_a_flood_of_tokens_holds_up_nobody_with_a_known_one() -> None:
    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> None:
        assert await gate.check("Bearer good") is ALLOWED
        kube.hold = asyncio.Event()
        flood = [asyncio.ensure_future(gate.check(f"Bearer {number}")) for number in range(100)]
        await asyncio.sleep(0)
        assert await gate.check("Bearer good") is ALLOWED
        assert len(kube.asked) == 2 + 4, "four at once"
        kube.hold.set()
        statuses = [verdict.status for verdict in await asyncio.gather(*flood)]
        assert (statuses.count(401), statuses.count(503)) == (32, 68)
        assert await gate.check("Bearer good") is ALLOWED
        assert len(kube.asked) == 2 + 32, "and is not forgotten"

    run(use)


def test_a_flood_of_tokens_holds_up_nobody_whose_verdict_has_become_too_old() -> None:
    """Prometheus asks for years, and its verdict holds for a minute."""

    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> None:
        assert await gate.check("Bearer good") is ALLOWED
        now.append(60.0)
        kube.hold = asyncio.Event()
        flood = [asyncio.ensure_future(gate.check(f"Bearer {number}")) for number in range(100)]
        await asyncio.sleep(0)
        renewed = asyncio.ensure_future(gate.check("Bearer good"))
        await asyncio.sleep(0)
        assert ("tokenreviews", {"token": "good"}) in kube.asked[2:]
        kube.hold.set()
        assert await renewed is ALLOWED
        await asyncio.gather(*flood)

    run(use)


def test_a_right_that_was_taken_away_is_no_longer_a_known_one() -> None:
    async def use(gate: Gate, kube: Reviewer, now: list[float]) -> None:
        assert await gate.check("Bearer good") is ALLOWED
        kube.rights.clear()
        now.append(60.0)
        assert (await gate.check("Bearer good")).status == 403
        now.append(120.0)
        kube.hold = asyncio.Event()
        flood = [asyncio.ensure_future(gate.check(f"Bearer {number}")) for number in range(32)]
        await asyncio.sleep(0)
        assert (await gate.check("Bearer good")).status == 503
        kube.hold.set()
        await asyncio.gather(*flood)

    run(use)


def test_only_so_many_verdicts_are_kept_the_newest() -> None:
    verdicts = Verdicts(size=2, seconds=10.0)
    for number in range(3):
        verdicts.keep(str(number), ALLOWED, float(number))
    verdicts.keep("1", Verdict(401, "no more"), 3.0)
    found = [verdicts.find(str(number), 4.0) for number in range(3)]
    assert found == [None, Verdict(401, "no more"), ALLOWED]
    assert verdicts.find("2", 12.0) is None, "too old"


@pytest.mark.parametrize(
    ("header", "want"),
    [("Bearer a", "a"), ("Bearer  a ", "a"), ("Bearer", ""), ("", ""), (None, ""), ("Digest a", ""), ("a", "")],
)
def test_parse_token(header: str | None, want: str) -> None:
    assert parse_token(header) == want

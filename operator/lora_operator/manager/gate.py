"""Who may read /metrics, where it needs a token: the API server says whose it is, and whether they may get it.

A TokenReview and a SubjectAccessReview for each token, as kube-rbac-proxy asks them. What the API server says is kept
for a minute; whoever sends ever new tokens gets it to ask in vain, but slowly, and holds up nobody with a known one.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from lora_operator.kube.client import KubeClient, load_configuration
from lora_operator.kube.errors import KubeError
from lora_operator.kube.ratelimit import RateLimit
from lora_operator.objects import Raw
from lora_operator.settings import Settings

logger = logging.getLogger(__name__)

PATH = "/metrics"

_KEPT_SECONDS = 60.0
_KEPT_VERDICTS = 256
_AT_ONCE = 4
_WAITING = 32
"""Reviews that are under way, and that may wait for that, before more are turned away."""

_QPS, _BURST, _TIMEOUT = 10.0, 20, 5.0


@dataclass(frozen=True)
class Verdict:
    """What to answer: the HTTP status, and a line that says why it is not 200."""

    status: int
    why: str = ""


ALLOWED = Verdict(200)
_NO_TOKEN = Verdict(401, "a token is needed (Authorization: Bearer TOKEN) of whoever may get /metrics of this cluster")
_BAD_TOKEN = Verdict(401, "the API server does not know this token, or it has expired, or is for another audience")
_BUSY = Verdict(503, "too many tokens are looked at already")
_SILENT = Verdict(
    503, "the API server was asked whose token this is, and did not say: the log of the operator has more"
)


def forbidden(user: str) -> Verdict:
    """The verdict on somebody who is known and may not."""
    return Verdict(403, f"{user} may not get /metrics: bind the ClusterRole that ends in -metrics-reader")


def parse_token(header: str | None) -> str:
    """The token of an Authorization header; empty if there is none."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class Verdicts:
    """The newest verdicts on tokens, of which only hashes are kept. Pure: the time is given to it."""

    def __init__(self, size: int = _KEPT_VERDICTS, seconds: float = _KEPT_SECONDS) -> None:
        self._size = size
        self._seconds = seconds
        self._kept: OrderedDict[bytes, tuple[float, Verdict]] = OrderedDict()

    def find(self, token: str, now: float) -> Verdict | None:
        """The verdict on ``token``, if it is not too old."""
        since, verdict = self._kept.get(_hash(token), (0.0, None))
        return verdict if verdict is not None and now - since < self._seconds else None

    def knows(self, token: str) -> bool:
        """Whether there is a verdict on ``token``, however old."""
        return _hash(token) in self._kept

    def forget(self, token: str) -> None:
        """Drops the verdict on ``token``."""
        self._kept.pop(_hash(token), None)

    def keep(self, token: str, verdict: Verdict, now: float) -> None:
        """Keeps ``verdict``, in the place of the oldest where there is no room."""
        key = _hash(token)
        self._kept.pop(key, None)
        self._kept[key] = now, verdict
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


class Gate:
    """Asks the API server about tokens."""

    def __init__(self, kube: KubeClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        # Apart, so that no flood of bad tokens pushes out a good one.
        self._allowed, self._refused = Verdicts(), Verdicts()
        self._places, self._reserved = asyncio.Semaphore(_AT_ONCE), asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def check(self, authorization: str | None) -> Verdict:
        """Whether the bearer of the header ``authorization`` may read the metrics."""
        token = parse_token(authorization)
        if not token:
            return _NO_TOKEN
        known = self._find(token)
        if known is not None:
            return known
        if self._allowed.knows(token):  # once a minute; in a place that no flood of other tokens takes
            async with self._reserved:
                return self._find(token) or await self._review(token)
        if self._waiting >= _WAITING:
            return _BUSY
        self._waiting += 1
        try:
            async with self._places:
                return self._find(token) or await self._review(token)
        finally:
            self._waiting -= 1

    def _find(self, token: str) -> Verdict | None:
        now = self._clock()
        return self._allowed.find(token, now) or self._refused.find(token, now)

    async def _review(self, token: str) -> Verdict:
        try:
            async with asyncio.timeout(2 * _TIMEOUT):
                verdict = await self._ask(token)
        except (KubeError, TimeoutError) as error:
            logger.warning("/metrics: whose token it is was not found out: %s", error)
            return _SILENT
        kept = self._allowed if verdict is ALLOWED else self._refused
        if kept is self._refused:
            self._allowed.forget(token)
        kept.keep(token, verdict, self._clock())
        return verdict

    async def _ask(self, token: str) -> Verdict:
        known = await self._kube.create_review("tokenreviews", {"token": token})
        if not known.get("authenticated"):
            return _BAD_TOKEN
        user: Raw = known["user"]
        asked: Raw = {name: user[name] for name in ("uid", "groups", "extra") if name in user}
        asked |= {"user": user["username"], "nonResourceAttributes": {"path": PATH, "verb": "get"}}
        answer = await self._kube.create_review("subjectaccessreviews", asked)
        return ALLOWED if answer.get("allowed") else forbidden(user["username"])


@asynccontextmanager
async def open_gate(settings: Settings, on_call: Callable[[str, str, int], None]) -> AsyncIterator[Gate | None]:
    """The gate before the metrics while the block runs; ``None`` where they need no token."""
    if settings.metrics_auth != "token":
        yield None
        return
    configuration = await load_configuration(settings.kubeconfig)
    # A client of its own: those who ask for metrics shall not use up the calls that runs need.
    kube = KubeClient(configuration, RateLimit(_QPS, _BURST), _TIMEOUT, on_call)
    try:
        yield Gate(kube)
    finally:
        await kube.close()

"""The client's own speed limit: a token bucket that also keeps every caller still while the server asks for it."""

import asyncio
from collections.abc import Callable


class TokenBucket:
    """``rate`` permits a second, up to ``burst`` at once. Pure: the time is given to it."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(max(burst, 1))
        self._tokens = self._burst
        self._at = 0.0
        self._closed_until = 0.0

    def reserve(self, now: float) -> float:
        """Takes one permit; returns the seconds to wait before it may be used."""
        start = max(now, self._closed_until)
        self._tokens = min(self._burst, self._tokens + max(0.0, start - self._at) * self._rate)
        self._at = max(start, self._at)
        self._tokens -= 1.0
        wait = -self._tokens / self._rate if self._tokens < 0 and self._rate > 0 else 0.0
        return start - now + wait

    def close(self, until: float) -> None:
        """No permit is good before ``until``: the server said 429 with Retry-After."""
        self._closed_until = max(self._closed_until, until)


class RateLimit:
    """A token bucket on the event loop's clock."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] | None = None) -> None:
        self._bucket = TokenBucket(rate, burst)
        self._clock = clock

    async def wait(self) -> None:
        """Waits for a permit."""
        delay = self._bucket.reserve(self._now())
        if delay > 0:
            await asyncio.sleep(delay)

    def hold(self, seconds: float) -> None:
        """Keeps every caller still for ``seconds``."""
        self._bucket.close(self._now() + seconds)

    def _now(self) -> float:
        return self._clock() if self._clock else asyncio.get_running_loop().time()

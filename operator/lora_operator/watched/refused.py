"""Namespaces that are to be served, and that the API server does not let us read: none of them takes another one down.

With --namespaces the operator has a role in each namespace, which goes with it, and which somebody may delete. kopf
ends as a whole where it is refused. So a refusal is told to it as a connection that broke: it goes on with all its
other watches, and connects anew. Meanwhile nothing is decided in that namespace: what is known of it may be old.
"""

import asyncio
import json
import logging
import re
from collections.abc import Iterable

import aiohttp

logger = logging.getLogger(__name__)

FORBIDDEN = 403
RETRY_SECONDS = 15.0
"""Between two tries to read a namespace that is refused."""

_COLLECTION = re.compile(r"/namespaces/([^/]+)/([^/]+)$")


class Refused:
    """Which of ``namespaces`` are refused, and why."""

    def __init__(self, namespaces: Iterable[str] = (), retry_seconds: float | None = None) -> None:
        self.retry_seconds = RETRY_SECONDS if retry_seconds is None else retry_seconds
        self._namespaces = frozenset(namespaces)
        self._why: dict[str, str] = {}
        self._watches: set[tuple[str, str, bool]] = set()

    def __contains__(self, namespace: str) -> bool:
        return namespace in self._why

    def names(self) -> list[str]:
        """The namespaces that are not served now."""
        return sorted(self._why)

    def can_be_watched(self, namespace: str) -> bool:
        """Whether no list and no watch of kopf in ``namespace`` was refused when it was asked for last."""
        return all(where != namespace for where, _, _ in self._watches)

    def refuse(self, namespace: str, why: str) -> None:
        """``namespace`` is not served from now on."""
        if namespace not in self._why:
            logger.error(
                "namespace %s is not served: %s. The others are. It is tried again every %.0f s; its role comes with "
                "the chart (helm upgrade), or take it out of --namespaces",
                namespace, why, self.retry_seconds,
            )  # fmt: skip
        self._why[namespace] = why

    def serve(self, namespace: str) -> None:
        """``namespace`` was read, and is served again."""
        if self._why.pop(namespace, None) is not None:
            logger.warning("namespace %s is served again", namespace)

    async def check(self, response: aiohttp.ClientResponse) -> None:
        """Looks at each answer that kopf gets.

        Raises:
            aiohttp.ClientConnectionError: it is a refusal in one of the namespaces, and a while has passed since.
        """
        found = _COLLECTION.search(response.url.path)
        if found is None or found[1] not in self._namespaces:
            return
        namespace, watch = found[1], (found[1], found[2], "watch" in response.url.query)
        if response.status != FORBIDDEN:
            self._watches.discard(watch)
            return
        self._watches.add(watch)
        why = _read_message(await response.text())
        self.refuse(namespace, why)
        await asyncio.sleep(self.retry_seconds)
        raise aiohttp.ClientConnectionError(why)


def _read_message(text: str) -> str:
    """What the API server says, or a proxy before it."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:1000]

"""How long one call may take, where that is not what all may take."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

patience: ContextVar[float | None] = ContextVar("patience", default=None)
"""Seconds; ``None``: the client's own time-out."""


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Calls that begin in here have ``seconds`` for an answer."""
    token = patience.set(seconds)
    try:
        yield
    finally:
        patience.reset(token)

"""How things are said to people."""

from collections.abc import Sequence

_MOST_NAMES = 5
"""Pods that a message names; of more it gives the number."""


def format_duration(seconds: int) -> str:
    """Seconds for people: 45s, 1m20s, 2h05m, 3d04h."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"


def with_remedy(message: str, remedy: str) -> str:
    """``<what happened>. Remedy: <what to do>``."""
    text = message.strip().rstrip(".") + "."
    return f"{text} Remedy: {remedy}" if remedy else text


def name_pods(names: Sequence[str]) -> str:
    """Pods in a message: the first few by their names."""
    if len(names) == 1:
        return f"pod {names[0]}"
    more = len(names) - _MOST_NAMES
    return f"pods {', '.join(names[:_MOST_NAMES])}" + (f" and {more} more" if more > 0 else "")

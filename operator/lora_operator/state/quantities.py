"""Quantities of Kubernetes, such as 500m or 1.5Gi. Pure."""

import re
from decimal import Decimal

_QUANTITY = re.compile(r"[+]?([0-9.]+)(?:[eE]([+-]?[0-9]+)|([numkMGTPE]|[KMGTPE]i))?")
_MOST_DIGITS = 18
_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("0.001"),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate(("", "k", "M", "G", "T", "P", "E"))},
    **{suffix: Decimal(1024) ** power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)},
}


def parse_exactly(quantity: str) -> Decimal:
    """The number that ``quantity`` is, such as 2, 4k or 1e3. Larger exponents than there are amounts are cut.

    Raises:
        ValueError: it is no quantity.
    """
    parts = _QUANTITY.fullmatch(quantity)
    if parts is None:
        raise ValueError(f"{quantity!r} is no quantity")
    number, exponent, suffix = parts.groups()
    power = max(-_MOST_DIGITS, min(_MOST_DIGITS, int(exponent or 0)))
    return Decimal(number if number != "." else 0).scaleb(power) * _SUFFIXES[suffix or ""]


def smallest(*quantities: str | None) -> str:
    """The smallest of the quantities that are there, as it is written. One has to be."""
    return min(filter(None, quantities), key=parse_exactly)


def largest(*quantities: str | None) -> str:
    """The largest of them."""
    return max(filter(None, quantities), key=parse_exactly)

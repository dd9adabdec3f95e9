"""Quantities of Kubernetes, such as 500m or 1.5Gi. Pure."""

from decimal import Decimal

_SUFFIXES = {
    "m": Decimal("0.001"),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate(("", "k", "M", "G", "T", "P", "E"))},
    **{suffix: Decimal(1024) ** power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)},
}


def parse_exactly(quantity: str) -> Decimal:
    """The number that ``quantity`` is."""
    number = quantity.rstrip("mkKMGTPEi")
    return Decimal(number) * _SUFFIXES[quantity[len(number) :]]


def smallest(*quantities: str | None) -> str:
    """The smallest of the quantities that are there, as it is written. One has to be."""
    return min(filter(None, quantities), key=parse_exactly)


def largest(*quantities: str | None) -> str:
    """The largest of them."""
    return max(filter(None, quantities), key=parse_exactly)

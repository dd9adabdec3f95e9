"""What the operator made for a run, and deletes after its end."""

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.lifecycle.cleanup import list_children
from tests.unit.operator.builders import a_preflight, a_run, condition, seen
from tests.unit.operator.cases import SETTINGS

PREFLIGHTS = ["configmaps/tickets-pre1", "configmaps/tickets-pre2", "configmaps/tickets-pre3"]
SERVICE, POLICY = "services/tickets-gang", "networkpolicies/tickets"


def list_attempts(last: int) -> list[str]:
    return [f"{kind}/tickets-{attempt}" for kind in ("configmaps", "services") for attempt in range(1, last + 1)]


@pytest.mark.parametrize(
    ("status", "parts", "want"),
    [
        ({}, [], [PREFLIGHTS[0], *list_attempts(1), SERVICE, POLICY]),
        ({"attempt": 2}, [], [PREFLIGHTS[0], *list_attempts(3), SERVICE, POLICY]),
        ({"failedPreflights": 1}, [], [*PREFLIGHTS[:2], *list_attempts(1), SERVICE, POLICY]),
        ({"failedPreflights": 1}, [a_preflight(3)], [*PREFLIGHTS, *list_attempts(1), SERVICE, POLICY]),
        (
            {"attempt": 2, "conditions": [condition("PreflightPassed")]},
            [],
            [*PREFLIGHTS[:2], *list_attempts(3), SERVICE, POLICY],
        ),
    ],
    ids=["nothing", "two attempts", "a preflight", "one more that is seen", "one that passed, whose Job is gone"],
)
def test_everything_is_listed_whatever_is_left_of_the_jobs(
    status: dict[str, Any], parts: list[Any], want: list[str]
) -> None:
    """With those of one more preflight and attempt: an operator may have ended before it wrote that it made them."""
    children = list_children(seen(a_run(status=status), *parts), SETTINGS)
    assert [f"{resource}/{name}" for resource, name in children] == want


def test_podgroups_are_listed_where_there_may_be_some() -> None:
    settings = replace(SETTINGS, gang_scheduler="volcano")
    children = list_children(seen(a_run(status={"attempt": 1})), settings)
    assert children == [
        ("configmaps", "tickets-pre1"),
        ("configmaps", "tickets-1"),
        ("configmaps", "tickets-2"),
        ("services", "tickets-1"),
        ("services", "tickets-2"),
        ("podgroups.volcano", "tickets-1"),
        ("podgroups.volcano", "tickets-2"),
        ("services", "tickets-gang"),
        ("networkpolicies", "tickets"),
    ]

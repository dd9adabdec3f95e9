"""What the operator made for a run, and deletes after its end."""

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.lifecycle.finished import list_children
from tests.unit.operator.builders import a_preflight, a_run, condition, seen
from tests.unit.operator.cases import SETTINGS

ATTEMPTS = ["configmaps/tickets-1", "configmaps/tickets-2", "services/tickets-1", "services/tickets-2"]
SERVICE, POLICY = "services/tickets-gang", "networkpolicies/tickets"


@pytest.mark.parametrize(
    ("status", "parts", "want"),
    [
        ({}, [], []),
        ({"attempt": 2}, [], [*ATTEMPTS, SERVICE, POLICY]),
        ({"failedPreflights": 1}, [], ["configmaps/tickets-pre1", POLICY]),
        ({"failedPreflights": 1}, [a_preflight(2)], ["configmaps/tickets-pre1", "configmaps/tickets-pre2", POLICY]),
        (
            {"attempt": 2, "conditions": [condition("PreflightPassed")]},
            [],
            ["configmaps/tickets-pre1", *ATTEMPTS, SERVICE, POLICY],
        ),
    ],
    ids=["nothing", "two attempts", "a preflight", "one more that is seen", "one that passed, whose Job is gone"],
)
def test_everything_is_listed_whatever_is_left_of_the_jobs(
    status: dict[str, Any], parts: list[Any], want: list[str]
) -> None:
    children = list_children(seen(a_run(status=status), *parts), SETTINGS)
    assert [f"{resource}/{name}" for resource, name in children] == want


def test_podgroups_are_listed_where_there_may_be_some() -> None:
    settings = replace(SETTINGS, gang_scheduler="volcano")
    children = list_children(seen(a_run(status={"attempt": 1})), settings)
    assert children == [
        ("configmaps", "tickets-1"),
        ("services", "tickets-1"),
        ("podgroups.volcano", "tickets-1"),
        ("services", "tickets-gang"),
        ("networkpolicies", "tickets"),
    ]

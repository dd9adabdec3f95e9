"""When what an ended run was made of is deleted."""

from typing import Any

import pytest

from lora_operator.policies.ttl import seconds_to_cleanup
from tests.unit.operator.builders import NOW, a_run, ago, seen, stamp

ENDED = {"completionTime": stamp(ago(40))}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float | None]] = {
    "without a time it stays": ({}, ENDED, None),
    "a run that has not ended stays": ({"ttlSecondsAfterFinished": 0}, {}, None),
    "the time counts from the end": ({"ttlSecondsAfterFinished": 100}, ENDED, 60.0),
    "it is over": ({"ttlSecondsAfterFinished": 40}, ENDED, 0.0),
    "at once": ({"ttlSecondsAfterFinished": 0}, ENDED, -40.0),
}


@pytest.mark.parametrize("name", CASES)
def test_time_to_live(name: str) -> None:
    policy, status, left = CASES[name]
    assert seconds_to_cleanup(seen(a_run(status=status, runPolicy=policy)), NOW) == left

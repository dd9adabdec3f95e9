"""The micro-batch after a run is out of memory. What follows in decide(): test_failing.py."""

from typing import Any

import pytest

from lora_api import Failure, FailureClass
from lora_operator.policies.memory import shrink_micro_batch
from tests.unit.operator.builders import NOW, a_run

GPU, HOST = FailureClass.GPU_OUT_OF_MEMORY, FailureClass.HOST_OUT_OF_MEMORY
SHRINK = {"onOutOfMemory": "shrinkMicroBatch"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], FailureClass, int, int | None]] = {
    "half of it": (SHRINK, {}, GPU, 1, 2),
    "of a pod as of a GPU": (SHRINK, {}, HOST, 1, 2),
    "nobody asked for that": ({}, {}, GPU, 1, None),
    "another failure": (SHRINK, {}, FailureClass.DIVERGED, 1, None),
    "a preflight holds no batch": (SHRINK, {}, HOST, 0, None),
    "one sequence is the least": (SHRINK, {"microBatchSize": 1}, GPU, 1, None),
    "what it was last": (SHRINK, {"microBatchSize": 2}, GPU, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_next_micro_batch(name: str) -> None:
    policy, status, failure_class, attempt, want = CASES[name]
    run = a_run(status={"attempt": 1, **status}, runPolicy=policy)
    assert shrink_micro_batch(run, Failure(attempt=attempt, failure_class=failure_class, at=NOW)) == want

"""What is counted when a status is written, and what is read from the cache."""

import json
import logging
from collections import Counter
from typing import Any

import pytest

from lora_api import LoRAFineTuneStatus
from lora_operator.logformat import JsonFormatter, current_run
from lora_operator.metrics import Metrics, Readings
from lora_operator.watched.cache import Cache, Resource
from tests.unit.operator.builders import NOW, ago, condition, failure, stamp

NAMESPACE = {"namespace": "team"}


def a_status(**fields: Any) -> LoRAFineTuneStatus:
    return LoRAFineTuneStatus.model_validate({"startTime": stamp(ago(300)), **fields})


def counted(old: LoRAFineTuneStatus, new: LoRAFineTuneStatus) -> Metrics:
    metrics = Metrics(Readings(Counter, dict, lambda: 0))
    metrics.count_change("team", old, new, NOW)
    return metrics


WAITING = a_status(conditions=[condition("Scheduled", "False", at=ago(120)), condition("Running", "False")])
SCHEDULED = a_status(conditions=[condition("Scheduled", "True", at=ago(40)), condition("Running", "False")])
RUNNING = a_status(conditions=[condition("Scheduled", "True", at=ago(40)), condition("Running", "True", at=NOW)])
FAILED_ONCE = a_status(failures=[failure(1)], gpuSeconds=80)
DONE = a_status(phase="Succeeded", completionTime=stamp(NOW))

CASES = {
    "a gang that got its nodes": (WAITING, SCHEDULED, "lora_operator_queue_wait_seconds_sum", NAMESPACE, 120.0),
    "a gang that began": (SCHEDULED, RUNNING, "lora_operator_startup_seconds_sum", NAMESPACE, 40.0),
    "a failure": (
        a_status(),
        FAILED_ONCE,
        "lora_operator_failures_total",
        {**NAMESPACE, "failure_class": "Internal"},
        1.0,
    ),
    "time of GPUs": (a_status(gpuSeconds=30), FAILED_ONCE, "lora_operator_gpu_seconds_total", NAMESPACE, 50.0),
    "the end": (
        a_status(),
        DONE,
        "lora_operator_run_duration_seconds_sum",
        {**NAMESPACE, "outcome": "Succeeded"},
        300.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_is_counted_once(case: str) -> None:
    old, new, name, labels, want = CASES[case]
    metrics = counted(old, new)
    assert metrics.registry.get_sample_value(name, labels) == want
    metrics.count_change("team", new, new, NOW)
    assert metrics.registry.get_sample_value(name, labels) == want


def test_speed_is_that_of_the_runs_that_train() -> None:
    cache = Cache()
    for number, (namespace, phase, speed) in enumerate(
        [("a", "Running", 100.0), ("a", "Running", 50.0), ("b", "Running", None), ("a", "Succeeded", 70.0)]
    ):
        names = {"namespace": namespace, "name": f"run-{number}", "uid": f"uid-{number}", "resourceVersion": "1"}
        status = {"phase": phase, "progress": {"tokensPerSecond": speed}}
        cache.put(Resource.RUNS, {"metadata": names, "spec": {}, "status": status})
    metrics = Metrics(Readings(cache.runs_by_phase, cache.tokens_per_second, lambda: 3))
    read = metrics.registry.get_sample_value
    assert read("lora_operator_tokens_per_second", {"namespace": "a"}) == 150.0
    assert read("lora_operator_tokens_per_second", {"namespace": "b"}) == 0.0
    assert read("lora_operator_runs", {"phase": "Running"}) == 3.0
    assert read("lora_operator_queue_depth", {}) == 3.0


def test_a_line_of_the_log_says_which_run_it_is_about() -> None:
    record = logging.LogRecord("lora_operator", logging.INFO, __file__, 1, "attempt %d", (2,), None)
    assert "run" not in json.loads(JsonFormatter().format(record))
    token = current_run.set("team/tickets")
    try:
        line = json.loads(JsonFormatter().format(record))
    finally:
        current_run.reset(token)
    assert (line["run"], line["message"], line["level"]) == ("team/tickets", "attempt 2", "info")

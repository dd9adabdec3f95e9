"""What a preflight finds in a real pod, before any gang is made."""

import json

import pytest

from lora_api import FailureClass, Phase, parse_termination
from lora_api.preflight import PreflightResult
from tests.cluster.conftest import TINY_DATA
from tests.cluster.runs import Runs, find_condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("preflight")]


def assert_no_gang(runs: Runs, name: str) -> None:
    assert [pod["metadata"]["labels"].get("lorafinetune.io/preflight") for pod in runs.pods(name)] == ["1"]
    jobs = json.loads(runs.kubectl("get", "jobs", f"--selector=lorafinetune.io/name={name}", "--output=json"))["items"]
    assert [job["metadata"]["name"] for job in jobs] == [f"{name}-pre1"]


def test_a_bad_record_is_named_with_its_number_and_no_gang_was_made(runs: Runs) -> None:
    name = runs.submit("bad-record", dataset={"train": {"uri": runs.store.uri("data/tiny/bad.jsonl")}})

    run = runs.wait_end(name)

    assert run.status.phase == Phase.FAILED
    assert (run.status.attempt, run.status.gpu_seconds) == (0, 0)
    failure = run.status.failures[-1]
    assert (failure.attempt, failure.failure_class, failure.exit_code) == (0, FailureClass.BAD_DATA, 65)
    for text in (failure.message, find_condition(run, "Stalled").message):
        assert "record 7" in text
        assert "completion" in text
    assert "[preflight failed]" in (failure.log_tail or "")
    assert '{"' not in (failure.log_tail or ""), "the log tail is for people"
    assert_no_gang(runs, name)


def test_a_model_that_is_not_there_is_named_and_no_gang_was_made(runs: Runs) -> None:
    name = runs.submit("no-model", baseModel={"uri": runs.store.uri("base/nothing-here")})

    run = runs.wait_end(name)

    assert run.status.failures[-1].failure_class == FailureClass.MODEL_NOT_FOUND
    assert "base/nothing-here" in find_condition(run, "Stalled").message
    assert_no_gang(runs, name)


def test_what_it_finds_is_in_its_log_and_in_the_status(runs: Runs) -> None:
    """The run trains a token that the tokenizer has in reserve, of which preflight warns."""
    name = runs.submit(
        "passed",
        training={"maxSteps": 1},
        lora={"newTokens": ["<issue_start>"]},
        dataset={"train": {"uri": runs.store.uri(f"{TINY_DATA}/marked.jsonl")}},
    )

    run = runs.wait_end(name)

    assert run.status.phase == Phase.SUCCEEDED
    [pod] = [pod for pod in runs.pods(name) if "lorafinetune.io/preflight" in pod["metadata"]["labels"]]
    line = next(line for line in runs.kubectl("logs", pod["metadata"]["name"]).splitlines() if line.startswith("{"))
    result = PreflightResult.model_validate_json(line)
    assert run.status.pins == result.pins
    assert run.status.plan is not None
    assert run.status.plan.total_steps == 1
    words = parse_termination(pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"])
    assert words is not None
    assert find_condition(run, "PreflightPassed").message == words.message
    assert "lora.newTokens (1): their rows of embedding and output head are trained too" in words.message
    path = "{.spec.template.metadata.annotations.lorafinetune\\.io/run}"
    document = json.loads(runs.kubectl("get", "job", f"{name}-1", f"--output=jsonpath={path}"))
    assert document["pins"] == result.pins.to_wire()

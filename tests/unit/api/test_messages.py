"""What the pods say: nothing that a log or a broken pod may hold can make a parser raise."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_api import FailureClass, ProgressLine, Termination, parse_progress_line, parse_termination
from lora_api.messages import TERMINATION_LIMIT
from lora_api.status import AdapterStatus

AT = datetime(2026, 11, 23, 18, 0, 0, tzinfo=UTC)

# Unlike text(), this has lone surrogates too: what Python makes of undecodable bytes.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=6000)


def termination(**values: object) -> Termination:
    return Termination.model_validate({"outcome": "failed", "class": "Internal", "at": AT, **values})


def test_a_step_survives_the_way_through_a_log() -> None:
    line = ProgressLine(event="step", at=AT, step=3, total_steps=18, loss=1.25, learning_rate=2e-4)
    text = line.to_line()
    assert text == (
        '{"lora":{"event":"step","at":"2026-11-23T18:00:00Z","step":3,"totalSteps":18,"loss":1.25,'
        '"learningRate":0.0002}}'
    )
    assert parse_progress_line(text) == line
    assert parse_progress_line(f"2026-11-23T18:00:00.123456789Z {text}\n") == line


def test_a_loss_that_json_cannot_carry_is_left_out() -> None:
    line = ProgressLine(event="step", at=AT, step=3, loss=math.nan, grad_norm=math.inf)
    assert "NaN" not in line.to_line()
    assert "Infinity" not in line.to_line()
    parsed = parse_progress_line('{"lora":{"event":"step","at":"2026-11-23T18:00:00Z","loss":NaN}}')
    assert parsed is not None
    assert parsed.loss is None


def test_a_newer_trainer_may_say_more() -> None:
    parsed = parse_progress_line('{"lora":{"event":"eval","at":"2026-11-23T18:00:00Z","colour":"blue"}}')
    assert parsed is not None
    assert parsed.event == "eval"
    parsed = parse_progress_line('{"lora":{"event":"dance","stage":"tango","at":"2026-11-23T18:00:00Z"}}')
    assert parsed == ProgressLine(event="dance", stage="tango", at=AT)


def test_the_last_words_of_a_newer_trainer_are_understood() -> None:
    words = {"version": 9, "outcome": "failed", "class": "FabricDegraded", "message": "m", "at": "2026-11-23T18:00:00Z"}
    parsed = parse_termination(json.dumps({**words, "fabric": "ib0"}))
    assert parsed is not None
    assert parsed.failure_class is not None
    assert (parsed.failure_class, parsed.failure_class.known) == ("FabricDegraded", False)


NO_PROGRESS = {
    "nothing": "",
    "another program's output": "Loading weights: 100%",
    "another program's json": '{"level": "info"}',
    "cut off": '{"lora":{"event":"step","at":"2026-11-',
    "no event": '{"lora":{"at":"2026-11-23T18:00:00Z"}}',
    "an event that is no word": '{"lora":{"event":"%s","at":"2026-11-23T18:00:00Z"}}' % ("d" * 65),
    "a number where an object belongs": '{"lora":1}',
    "a negative step": '{"lora":{"event":"step","at":"2026-11-23T18:00:00Z","step":-1}}',
    "a number of 5000 digits": '{"lora":{"event":"step","at":"2026-11-23T18:00:00Z","step":%s}}' % ("9" * 5000),
    "a moment out of range": '{"lora":{"event":"step","at":1e400}}',
    "nested beyond the stack": '{"lora":' + "[" * 100_000,
    "two on one line": '{"lora":{"event":"eval","at":"2026-11-23T18:00:00Z"}}{"lora":{}}',
}


@pytest.mark.parametrize("case", NO_PROGRESS)
def test_a_line_that_is_no_progress_is_none(case: str) -> None:
    assert parse_progress_line(NO_PROGRESS[case]) is None


@given(ANY_TEXT)
def test_no_line_makes_the_parser_raise(text: str) -> None:
    parse_progress_line(text)
    parse_progress_line('{"lora"' + text)
    parse_progress_line('{"lora":{"event":"step","at":"' + text)


@given(ANY_TEXT)
def test_no_termination_message_makes_the_parser_raise(text: str) -> None:
    parse_termination(text)
    parse_termination('{"outcome":"failed","at":"2026-11-23T18:00:00Z","message":"' + text + '"}')


@given(message=ANY_TEXT, remedy=st.none() | ANY_TEXT, limit=st.integers(300, TERMINATION_LIMIT))
def test_last_words_fit_whatever_their_text(message: str, remedy: str | None, limit: int) -> None:
    written = termination(message=message * 3, remedy=remedy)
    text = written.to_message(limit)
    assert len(text.encode()) <= limit
    read = parse_termination(text)
    assert read is not None
    assert read.failure_class is FailureClass.INTERNAL
    assert read.at == AT
    if len(written.to_message(10**6).encode()) <= limit:
        assert read == written


CUT = {
    "plain": "x" * 10_000,
    "three bytes a character": "\u4e16" * 10_000,
    "four bytes a character": "\U0001f600" * 10_000,
    "two bytes a character once escaped": '"' * 10_000,
    "bytes that were never text": b"\xff".decode(errors="surrogateescape") * 10_000,
}


@pytest.mark.parametrize("case", CUT)
def test_a_long_message_keeps_its_beginning_and_its_end(case: str) -> None:
    text = termination(message=f"BEGIN{CUT[case]}END", remedy="Read it.").to_message()
    assert 3600 < len(text.encode()) <= TERMINATION_LIMIT
    read = parse_termination(text)
    assert read is not None
    assert read.message.startswith("BEGIN")
    assert read.message.endswith("END")
    assert " ... " in read.message
    assert read.remedy == "Read it."


def test_what_nobody_sees_takes_no_room() -> None:
    read = parse_termination(termination(message="BEGIN\x01\x1b[1;31m" + "\x01" * 10_000 + "END\n\tx").to_message())
    assert read is not None
    assert read.message == "BEGINEND\n\tx"


def test_a_short_message_is_not_touched() -> None:
    assert json.loads(termination(message='a "quoted" caf\u00e9').to_message())["message"] == 'a "quoted" caf\u00e9'


def test_success_carries_the_adapter() -> None:
    adapter = AdapterStatus(
        uri="s3://b/p/ns/n/sha256-0",
        digest="sha256:" + "0" * 64,
        version=3,
        served_name="n-v3",
        rank=8,
        serving_max_lora_rank=8,
        size_bytes=1,
        eval_loss_before=math.nan,
        eval_loss_after=0.5,
    )
    written = Termination(outcome="succeeded", at=AT, adapter=adapter)
    read = parse_termination(written.to_message())
    assert read == written
    assert read is not None
    assert read.adapter is not None
    assert read.adapter.eval_loss_before is None


@pytest.mark.parametrize("message", [None, "", "OOM", "[]", "null", '{"outcome":"failed"}', '{"outcome":"?","at":"x"}'])
def test_other_last_words_are_none(message: str | None) -> None:
    assert parse_termination(message) is None


MOMENTS = {
    "in another zone": datetime(2026, 11, 23, 19, 0, 0, tzinfo=timezone(timedelta(hours=1))),
    "without a zone, so in UTC": datetime(2026, 11, 23, 18, 0, 0),  # noqa: DTZ001
    "with microseconds": datetime(2026, 11, 23, 18, 0, 0, 999_999, tzinfo=UTC),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_a_moment_is_written_in_utc_with_whole_seconds(case: str) -> None:
    line = ProgressLine(event="eval", at=MOMENTS[case])
    assert line.to_wire()["at"] == "2026-11-23T18:00:00Z"

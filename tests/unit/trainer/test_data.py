"""Reading, checking and splitting records."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from lora_api.finetune import Dataset
from lora_trainer.data import load_records, read_records, record_position, split_records
from lora_trainer.errors import BadDataError
from lora_trainer.sources import Sources

GOOD = {"prompt": "a", "completion": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

FORMATS: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "prompt-completion": GOOD,
    "messages": {"messages": [USER, ASSISTANT]},
}

BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line: is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "line: is not UTF-8"),
    "a list": ("[1]", "record: must be an object with fields, is a list"),
    "a missing field": ({"prompt": "a"}, "completion: is missing (the format is prompt-completion)"),
    "null": ({"prompt": "a", "completion": None}, "completion: is missing"),
    "a number": ({"prompt": 5, "completion": "b"}, "prompt: must be a string, is a number"),
    "an empty completion": ({"prompt": "a", "completion": "  "}, "completion: is empty"),
    "two forms": ({"prompt": "a", "completion": [ASSISTANT]}, "completion: must have the form of prompt"),
    "a message without content": (
        {"prompt": [{"role": "user"}], "completion": [ASSISTANT]}, "prompt[0].content: must be a string, is null"),
    "an unknown role": (
        {"prompt": [{"role": "boss", "content": "a"}], "completion": [ASSISTANT]}, "prompt[0].role: must be one of"),
    "a message that is none": ({"prompt": ["a"], "completion": [ASSISTANT]}, "prompt[0]: must be an object"),
    "no message": ({"prompt": [], "completion": [ASSISTANT]}, "prompt: is an empty list"),
    "no answer": ({"prompt": [USER], "completion": [USER]}, "completion: has no message of the assistant"),
}  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_found(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", FORMATS[name] | {"id": 5}, "", FORMATS[name])
    assert read_records([file], "auto") == (name, [FORMATS[name]] * 2)
    assert read_records([file], name)[0] == name


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_named(case: str, tmp_path: Path) -> None:
    row, reason = BAD[case]
    file = write(tmp_path / "a.jsonl", GOOD, "", row)
    with pytest.raises(BadDataError) as caught:
        read_records([file], "auto")
    assert f"a.jsonl: record 3: {reason}" in str(caught.value)


def test_twenty_bad_records_are_named_and_the_others_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[{"prompt": "a", "completion": 1}] * 25)
    with pytest.raises(BadDataError) as caught:
        read_records([file], "prompt-completion")
    text = str(caught.value)
    assert text.startswith("25 records are bad:\n")
    assert "record 20:" in text
    assert "record 21:" not in text
    assert text.endswith("... and 5 more")


def test_a_first_record_without_a_format_says_what_there_is(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(BadDataError, match="has question, answer; a record has messages; or prompt and completion; or"):
        read_records([file], "auto")


def test_parquet_is_read_like_lines(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_records([tmp_path / "a.parquet"], "auto") == ("messages", rows)
    pa.parquet.write_table(pa.Table.from_pylist([GOOD, {"prompt": "a", "completion": ""}]), tmp_path / "b.parquet")
    with pytest.raises(BadDataError, match=r"b\.parquet: record 2: completion: is empty"):
        read_records([tmp_path / "b.parquet"], "auto")
    write(tmp_path / "c.parquet", "no table")
    with pytest.raises(BadDataError, match="is not a Parquet file"):
        read_records([tmp_path / "c.parquet"], "auto")


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="there is no record"):
        read_records([write(tmp_path / "a.jsonl", "")], "auto")


def test_rows_added_later_move_none() -> None:
    rows = [{"text": str(number)} for number in range(1000)]
    train, held_out = split_records(rows, 0.1)
    more_train, more_held_out = split_records(rows + [{"text": f"new {number}"} for number in range(1000)], 0.1)
    assert 60 < len(held_out) < 140
    assert all(row in more_held_out for row in held_out)
    assert all(row in more_train for row in train)
    assert split_records(rows, 0.0) == (rows, [])


def test_there_is_always_something_to_measure_with() -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    train, held_out = split_records(rows, 1e-9)
    assert held_out == [min(rows, key=record_position)]
    assert len(train) == 2
    assert split_records(rows[:1], 0.5) == (rows[:1], [])


def test_the_eval_set_has_the_format_of_the_training_set(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", {"text": "a"})
    dataset = Dataset.model_validate({"train": {"uri": "file:///a"}, "eval": {"uri": "file:///b"}})
    with pytest.raises(BadDataError, match=r"b\.jsonl: record 1: prompt: is missing"):
        load_records(dataset, Sources(tmp_path, [train], [evaluation]))
    loaded = load_records(dataset, Sources(tmp_path, [train], [train]))
    assert (loaded.format, loaded.conversational, len(loaded.eval)) == ("prompt-completion", False, 1)

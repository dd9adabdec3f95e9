"""Reading, checking and splitting records."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset as Table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_api.sources import Dataset
from lora_trainer.data import load_records, read_records, record_position, split_records
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.sources import Sources

GOOD = {"prompt": "a", "completion": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ALPACA = {"instruction": "do", "input": "it", "output": "done", "text": "all of it"}
SYSTEM = {"role": "system", "content": "s"}

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
    "a turn that is none": ({"conversations": [5]}, "conversations[0]: must be an object with from and value"),
    "an unknown speaker": ({"conversations": [{"from": "cat", "value": "x"}]}, "conversations[0].from: must be one of"),
    "a tool call": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
        "messages[0].tool_calls: is not supported"),
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
    formats = {"conversations": "sharegpt", "messages": "messages"}
    declared = formats.get(next(iter(row)), "prompt-completion") if isinstance(row, dict) else "prompt-completion"
    first = {"sharegpt": SHAREGPT, "messages": FORMATS["messages"]}.get(declared, GOOD)
    file = write(tmp_path / "a.jsonl", first, "", row)
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
    assert text.endswith("... and 5 more\nby kind:\n25 x completion: must be a string")


def test_a_first_record_without_a_format_says_what_there_is(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(BadDataError, match="has question, answer; a record has messages; or conversations; or"):
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
    smaller = next(row for n in range(1000) if record_position(row := {"text": f"{n}"}) < record_position(held_out[0]))
    assert split_records([*rows, smaller], 1e-9) == (rows, [smaller]), "only here an added row moves another"
    assert split_records(rows[:1], 0.5) == (rows[:1], [])


def test_the_eval_set_has_the_format_of_the_training_set(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", {"text": "a"})
    dataset = Dataset.model_validate({"train": {"uri": "file:///a"}, "eval": {"uri": "file:///b"}})
    with pytest.raises(BadDataError, match=r"b\.jsonl: record 1: prompt: is missing"):
        load_records(dataset, Sources(tmp_path, [train], [evaluation]))
    loaded = load_records(dataset, Sources(tmp_path, [train], [train]))
    assert (loaded.format, loaded.conversational, len(loaded.eval)) == ("prompt-completion", False, 1)


def test_conversations_of_sharegpt_become_messages(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", SHAREGPT)
    assert read_records([file], "auto") == ("sharegpt", [{"messages": [USER, ASSISTANT]}])


def test_instructions_of_alpaca_go_through_the_template_where_there_is_one(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ALPACA, {**ALPACA, "input": ""}, {"instruction": "do", "output": "done"})
    answer = [{"role": "assistant", "content": "done"}]
    found, records = read_records([file], "auto")
    assert found == "alpaca"
    assert records == [
        {"prompt": [{"role": "user", "content": text}], "completion": answer} for text in ("do\n\nit", "do", "do")
    ]
    with_input, without = read_records([file], "auto", chat=False)[1][:2]
    assert with_input["prompt"].endswith("\n\n### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n")
    assert without["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\ndo\n\n### Response:\n"
    )
    assert without["completion"] == "done"


def test_columns_are_renamed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b", "prompt": "not this one"})
    columns = {"prompt": "question", "completion": "answer"}
    assert read_records([file], "auto", columns) == ("prompt-completion", [GOOD])
    with pytest.raises(BadDataError, match="completion: is missing"):
        read_records([file], "prompt-completion", {"prompt": "question"})
    with pytest.raises(BadSpecError, match=r"dataset\.columns: text: the format prompt-completion has prompt"):
        read_records([file], "auto", {**columns, "text": "t"})


def test_the_system_prompt_is_for_conversations_without_one(tmp_path: Path) -> None:
    own = {"role": "system", "content": "own"}
    file = write(tmp_path / "a.jsonl", {"messages": [USER, ASSISTANT]}, {"messages": [own, USER, ASSISTANT]})
    _, records = read_records([file], "auto", None, "s")
    assert [record["messages"][0] for record in records] == [SYSTEM, own]
    pair = write(tmp_path / "b.jsonl", {"prompt": [USER], "completion": [ASSISTANT]})
    assert read_records([pair], "auto", None, "s")[1] == [{"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}]
    alpaca = write(tmp_path / "c.jsonl", ALPACA)
    assert read_records([alpaca], "auto", None, "s")[1][0]["prompt"][0] == SYSTEM
    plain = [(write(tmp_path / "d.jsonl", GOOD), True), (write(tmp_path / "e.jsonl", {"text": "a"}), True)]
    for file, chat in [*plain, (alpaca, False)]:
        with pytest.raises(BadSpecError, match=r"dataset\.systemPrompt: .* plain text"):
            read_records([file], "auto", None, "s", chat=chat)


def test_one_array_and_csv_are_read_like_lines(tmp_path: Path) -> None:
    array, table = tmp_path / "a.json", tmp_path / "a.csv"
    array.write_text(json.dumps([GOOD, GOOD]))
    table.write_text('id,prompt,completion\n1,a,b\n\n2,"a\n""b""",b\n')
    assert read_records([array], "auto") == ("prompt-completion", [GOOD, GOOD])
    assert read_records([table], "auto")[1] == [GOOD, {"prompt": 'a\n"b"', "completion": "b"}]
    table.write_text('prompt,completion\na,b\na\na,b,c\n"a')
    with pytest.raises(BadDataError) as caught:
        read_records([table], "auto")
    for words in ("record 2: completion: is missing", "record 3: row: has more cells", "record 4: row: is not CSV"):
        assert words in str(caught.value)
    for text, words in (("{}", "must be one array"), ('{"text": "a"}\n{"text": "b"}', "is a .jsonl")):
        array.write_text(text)
        with pytest.raises(BadDataError, match=words):
            read_records([array], "auto")
    table.write_text("text,text\n")
    with pytest.raises(BadDataError, match="the same name"):
        read_records([table], "auto")


def test_strings_and_conversations_do_not_mix(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", GOOD, {"prompt": [USER], "completion": [ASSISTANT]})
    with pytest.raises(BadDataError, match=r"record 2: prompt: must have the form of the first record's"):
        read_records([rows], "auto")


NAMES = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "role",
         "content", "from", "value", "tool_calls")  # fmt: skip
WORDS = st.sampled_from(("user", "assistant", "system", "human", "gpt", "a", "", "\ud800"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS, "content": WORDS}) | st.fixed_dictionaries({"from": WORDS, "value": WORDS}),
    max_size=3,
)
RECORDS = VALUES | st.dictionaries(st.sampled_from(NAMES), VALUES | MESSAGES | WORDS, max_size=4)
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(file: Path, *, chat: bool = True) -> None:
    """The records can be put into a table, or are refused in words that can be written to a log."""
    try:
        _, records = read_records([file], "auto", chat=chat)
    except BadDataError as error:
        str(error).encode()
    else:
        Table.from_list(records)


@QUIET
@given(rows=st.lists(RECORDS, max_size=4), chat=st.booleans())
def test_no_record_ends_in_a_stack_trace(rows: list[Any], chat: bool, tmp_path: Path) -> None:
    read_or_refuse(write(tmp_path / "a.jsonl", *map(json.dumps, rows)), chat=chat)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    read_or_refuse(tmp_path / "a.json", chat=chat)


@QUIET
@given(content=st.binary(max_size=200), suffix=st.sampled_from(("jsonl", "json", "csv", "parquet", "arrow")))
def test_no_bytes_end_in_a_stack_trace(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    read_or_refuse(file)


@QUIET
@given(cut=st.integers(min_value=0, max_value=600))
def test_a_file_that_was_cut_is_refused(cut: int, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist([GOOD] * 20), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:cut])
    read_or_refuse(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_a_directory_with_the_name_of_a_file_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").mkdir()
    with pytest.raises(BadDataError, match=rf"a\.{suffix}: is no file"):
        read_records([tmp_path / f"a.{suffix}"], "auto")

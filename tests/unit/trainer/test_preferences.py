"""Preference pairs as records: the forms that published sets have, and what is wrong with a record."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_api.sources import Dataset
from lora_trainer.data import load_records, read_records
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.formats import check, convert
from lora_trainer.sources import Sources


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASK, GOOD, BAD = user("q"), assistant("yes"), assistant("no")
MESSAGES = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"prompt": "q", "chosen": "yes", "rejected": "no"}
HH = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strings": (TEXTS, TEXTS),
    "messages": (MESSAGES, MESSAGES),
    "a conversation and answers as strings": ({"prompt": [ASK], "chosen": "yes", "rejected": "no"}, MESSAGES),
    "whole conversations without a prompt": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, MESSAGES),
    "whole conversations, and the prompt again as a string": (
        {"prompt": "q ", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, MESSAGES),
    "whole conversations, and the prompt again as messages": (
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, MESSAGES),
    "the prompt as a string and answers as messages": ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, MESSAGES),
    "conversations of more turns": (
        {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]},
        {"prompt": [ASK, GOOD, ASK], "chosen": [GOOD], "rejected": [BAD]}),
    "more than content and role": (
        {"chosen": [ASK | {"name": "x"}, GOOD | {"score": 5}], "rejected": [ASK | {"name": "x"}, BAD]}, MESSAGES),
    "strings of Anthropic's set": (
        {"chosen": f"{HH} yes, it is", "rejected": f"{HH} yes, it was"},
        {"prompt": HH, "chosen": " yes, it is", "rejected": " yes, it was"}),
    "strings that begin alike are cut before a word": (
        {"chosen": "the cat is here", "rejected": "the cat isn't"},
        {"prompt": "the cat", "chosen": " is here", "rejected": " isn't"}),
    "other fields beside them": (
        MESSAGES | {"messages": [ASK, GOOD], "score_chosen": 9.0, "prompt_id": "x"}, MESSAGES),
}  # fmt: skip

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "equal answers": (TEXTS | {"rejected": "yes"}, "rejected: is equal to chosen"),
    "equal conversations": ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "rejected: is equal to chosen"),
    "no chosen": ({"prompt": "q", "chosen": None, "rejected": "no"}, "chosen: is missing (the format is preference)"),
    "an empty answer": (TEXTS | {"rejected": " "}, "rejected: is empty"),
    "an empty prompt": (TEXTS | {"prompt": ""}, "prompt: is empty"),
    "a number": (TEXTS | {"chosen": 5}, "chosen: must be a string, is a number"),
    "half of a surrogate pair": (TEXTS | {"chosen": "\ud800"}, "chosen: is not Unicode text"),
    "two forms": (TEXTS | {"rejected": [BAD]}, "rejected: must have the form of chosen: that is a string"),
    "a message without content": (
        MESSAGES | {"chosen": [{"role": "assistant"}]}, "chosen[0].content: must be a string, is null"),
    "an unknown role": (MESSAGES | {"rejected": [{"role": "gpt", "content": "x"}]}, "rejected[0].role: must be one of"),
    "no answer": (MESSAGES | {"chosen": [ASK]}, "chosen: has no message of the assistant"),
    "conversations without a shared start": ({"chosen": [GOOD], "rejected": [BAD]}, "prompt: is missing, and chosen"),
    "strings without a shared start": ({"chosen": "yes", "rejected": "no"}, "prompt: is missing, and chosen"),
    "one string is the start of the other": (
        {"chosen": f"{HH} b", "rejected": HH}, "rejected: is empty after the prompt"),
    "a prompt of another conversation": (
        {"prompt": "other", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "prompt: is not among the messages"),
    "conversations that part at a question": (
        {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, user("r"), BAD]},
        "chosen: may differ from rejected in the last answer only, but has a message of user behind it"),
    "conversations that part early": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD, ASK, BAD]},
        "rejected: may differ from chosen in the last answer only, but has a message of user behind it"),
}  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("case", FORMS)
def test_each_form_of_a_pair_is_found_and_split(case: str, tmp_path: Path) -> None:
    row, expected = FORMS[case]
    file = write(tmp_path / "a.jsonl", row, row)
    assert read_records([file], "auto", preferences=True) == ("preference", [expected] * 2)
    assert read_records([file], "preference", preferences=True)[1] == [expected] * 2


@pytest.mark.parametrize("case", FAULTS)
def test_a_bad_pair_is_named(case: str, tmp_path: Path) -> None:
    row, reason = FAULTS[case]
    file = write(tmp_path / "a.jsonl", TEXTS, TEXTS | {"chosen": "yes!"}, row)
    with pytest.raises(BadDataError) as caught:
        read_records([file], "auto", preferences=True)
    assert f"a.jsonl: record 3: {reason}" in str(caught.value)


def test_text_and_conversations_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="record 2: prompt: must have the form of the first record's"):
        read_records([write(tmp_path / "a.jsonl", TEXTS, MESSAGES)], "auto", preferences=True)


def test_columns_and_the_system_prompt_apply(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": [ASK], "better": [GOOD], "worse": [BAD]})
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    _, records = read_records([file], "auto", columns, "Be brief.", preferences=True)
    assert records == [MESSAGES | {"prompt": [{"role": "system", "content": "Be brief."}, ASK]}]
    with pytest.raises(BadSpecError, match=r"dataset.systemPrompt: the records \(preference\) are plain text"):
        read_records([write(tmp_path / "b.jsonl", TEXTS)], "auto", None, "Be brief.", preferences=True)
    with pytest.raises(BadSpecError, match="columns: text: the format preference has prompt, chosen, rejected"):
        read_records([write(tmp_path / "b.jsonl", TEXTS)], "auto", {"text": "other"}, preferences=True)


MISFITS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "pairs for sft": ("sft", "auto", TEXTS, "training.objective: sft cannot learn from pairs"),
    "pairs for sft, by their format": ("sft", "preference", TEXTS, "training.objective: sft cannot learn from pairs"),
    "prompt and completion for dpo": (
        "dpo", "auto", {"prompt": "a", "completion": "b"}, "the records have the format prompt-completion"),
    "messages for dpo, by their format": (
        "dpo", "messages", {"messages": [ASK, GOOD]}, "the records have the format messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_records_that_the_objective_cannot_learn_from_are_refused(case: str, tmp_path: Path) -> None:
    objective, kind, row, reason = MISFITS[case]
    file = write(tmp_path / "a.jsonl", row)
    dataset = Dataset.model_validate({"train": {"uri": f"file://{file}"}, "format": kind})
    with pytest.raises(BadSpecError) as caught:
        load_records(dataset, Sources(tmp_path, [file], None), objective=objective)
    assert reason in str(caught.value)


def test_a_set_with_messages_beside_its_pairs_serves_both_objectives(tmp_path: Path) -> None:
    row, _ = FORMS["other fields beside them"]
    file = write(tmp_path / "a.jsonl", row)
    assert read_records([file], "auto", preferences=False)[0] == "messages"
    assert read_records([file], "auto", preferences=True)[0] == "preference"


WORDS = st.sampled_from(["", " ", "a", "a b", "\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "\ud800", "ä"])
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "boss"]), "content": WORDS})
    | st.sampled_from([5, None, {}]),
    max_size=3,
)
ANYTHING = WORDS | TURNS | st.sampled_from([None, 5, {}, [[]]])


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({"chosen": ANYTHING, "rejected": ANYTHING}, optional={"prompt": ANYTHING}))
def test_every_pair_is_refused_or_becomes_two_answers_to_one_prompt(row: dict[str, Any]) -> None:
    if check(row, "preference") is not None:
        return
    record = convert(row, "preference", None, chat=True)
    assert set(record) == {"prompt", "chosen", "rejected"}
    assert len({type(part) for part in record.values()}) == 1
    assert all(record.values())
    assert record["chosen"] != record["rejected"]
    if isinstance(record["prompt"], list):
        assert all(message["role"] in ("assistant", "tool") for message in record["chosen"] + record["rejected"])

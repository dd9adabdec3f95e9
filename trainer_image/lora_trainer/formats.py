"""Forms of a record: how each is found, checked, and brought to one of the four that are trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Format = Literal["messages", "sharegpt", "prompt-completion", "alpaca", "text", "preference"]
Record = dict[str, Any]
Problem = tuple[str, str]
"""Field and reason."""

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}

# In the order in which they are tried. Alpaca comes before text: its published set has a text field as well.
FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}

ALPACA_INTRODUCTION = "Below is an instruction that describes a task{input}. Write a response that appropriately " \
    "completes the request."  # fmt: skip
ALPACA_INPUT = ", paired with an input that provides further context"
"""The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, "Data Release")."""


ASSISTANT_TURN = "\n\nAssistant:"
"""How a turn of the assistant begins in the strings of Anthropic/hh-rlhf (arXiv:2204.05862)."""


def detect_format(value: object, *, preferences: bool = False) -> Format | None:
    """The format whose fields ``value`` has, or ``None``.

    ``preferences`` puts preference first, because published sets of pairs have messages or text beside them
    (HuggingFaceH4/ultrafeedback_binarized), which objective sft can learn from.
    """
    if isinstance(value, dict):
        names: list[Format] = ["preference", *FIELDS] if preferences else list(FIELDS)
        for name in names:
            if all(field in value for field in FIELDS[name]):
                return name
    return None


def rename(value: object, columns: Mapping[str, str]) -> object:
    """``value`` with the fields that its format expects, taken from ``columns``: {expected name: name in the file}."""
    if not columns or not isinstance(value, dict):
        return value
    rest = {name: content for name, content in value.items() if name not in columns}
    return rest | {field: value[column] for field, column in columns.items() if column in value}


def check(value: object, kind: Format | None) -> Problem | None:
    """What is wrong with ``value`` as a record of ``kind``, or ``None``."""
    if not isinstance(value, dict):
        return "record", f"must be an object with fields, is {kind_of(value)}"
    if kind is None:
        wanted = "; or ".join(" and ".join(fields) for fields in FIELDS.values())
        has = ", ".join(map(str, value)) or "no fields"
        return "record", f"fits no format: has {has[:150]}; a record has {wanted}"
    for field in FIELDS[kind]:
        if field not in value or value[field] is None:
            return field, f"is missing (the format is {kind})"
    if kind == "messages":
        return _check_messages("messages", value["messages"], needs_assistant=True)
    if kind == "sharegpt":
        return _check_sharegpt(value["conversations"])
    if kind == "prompt-completion":
        return _check_pair(value["prompt"], value["completion"])
    if kind == "alpaca":
        given = value.get("input")
        return (
            _check_text("instruction", value["instruction"])
            or (None if given is None or given == "" else _check_text("input", given, may_be_blank=True))
            or _check_text("output", value["output"])
        )
    if kind == "preference":
        return _check_preference(value)
    return _check_text("text", value["text"])


def convert(value: Record, kind: Format, system_prompt: str | None, *, chat: bool) -> Record:
    """A checked record as messages, prompt and completion, text, or prompt, chosen and rejected.

    ``chat``: the model has a chat template.
    """
    if kind == "text":
        return {"text": value["text"]}
    if kind == "messages":
        return {"messages": _with_system(_plain(value["messages"]), system_prompt)}
    if kind == "sharegpt":
        turns = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in value["conversations"]]
        return {"messages": _with_system(turns, system_prompt)}
    if kind == "preference":
        prompt, chosen, rejected = split_pair(value.get("prompt"), value["chosen"], value["rejected"])
        start = _with_system(prompt, system_prompt) if isinstance(prompt, list) else prompt
        return {"prompt": start, "chosen": chosen, "rejected": rejected}
    if kind == "alpaca":
        return _convert_alpaca(value, system_prompt, chat=chat)
    if isinstance(value["prompt"], list):
        prompt = _with_system(_plain(value["prompt"]), system_prompt)
        return {"prompt": prompt, "completion": _plain(value["completion"])}
    return {"prompt": value["prompt"], "completion": value["completion"]}


def is_conversation(record: Record) -> bool:
    """Whether a converted record goes through the model's chat template."""
    return "messages" in record or isinstance(record.get("prompt"), list)


def _convert_alpaca(value: Record, system_prompt: str | None, *, chat: bool) -> Record:
    instruction, given, output = value["instruction"], (value.get("input") or "").strip(), value["output"]
    if chat:
        question = {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}
        return {
            "prompt": _with_system([question], system_prompt),
            "completion": [{"role": "assistant", "content": output}],
        }
    introduction = ALPACA_INTRODUCTION.format(input=ALPACA_INPUT if given else "")
    parts = [introduction, f"### Instruction:\n{instruction}", *([f"### Input:\n{given}"] if given else [])]
    return {"prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": output}


def _plain(messages: list[Record]) -> list[Record]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _with_system(messages: list[Record], system_prompt: str | None) -> list[Record]:
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _check_pair(prompt: object, completion: object) -> Problem | None:
    if isinstance(prompt, list) != isinstance(completion, list):
        return "completion", f"must have the form of prompt: that is {kind_of(prompt)}, this is {kind_of(completion)}"
    if isinstance(prompt, list):
        return _check_messages("prompt", prompt) or _check_messages("completion", completion, needs_assistant=True)
    return _check_text("prompt", prompt) or _check_text("completion", completion)


def _check_preference(value: Record) -> Problem | None:
    prompt = value.get("prompt")
    if isinstance(prompt, list):
        problem = _check_messages("prompt", prompt)
    else:
        problem = None if prompt is None else _check_text("prompt", prompt)
    for field in ("chosen", "rejected"):
        answer = value[field]
        if isinstance(answer, list):
            problem = problem or _check_messages(field, answer, needs_assistant=True)
        else:
            problem = problem or _check_text(field, answer)
    if problem:
        return problem
    if type(value["chosen"]) is not type(value["rejected"]):
        kinds = f"that is {kind_of(value['chosen'])}, this is {kind_of(value['rejected'])}"
        return "rejected", f"must have the form of chosen: {kinds}"
    start, chosen, rejected = split_pair(prompt, value["chosen"], value["rejected"])
    if chosen == rejected:
        return "rejected", "is equal to chosen, so there is nothing to prefer"
    if not start or (isinstance(start, str) and not start.strip()):
        return "prompt", "is missing, and chosen and rejected do not begin with the same prompt"
    if isinstance(prompt, str) and isinstance(start, list) and not _asks(start, prompt):
        return "prompt", "is not among the messages that chosen and rejected begin with"
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, str):
            if not answer.strip():
                return field, "is empty after the prompt"
        elif any(message["role"] not in ("assistant", "tool") for message in answer):
            other = "rejected" if field == "chosen" else "chosen"
            speaker = next(message["role"] for message in answer if message["role"] not in ("assistant", "tool"))
            return field, f"may differ from {other} in the last answer only, but has a message of {speaker} behind it"
    return None


def _asks(messages: list[Record], prompt: str) -> bool:
    return any(message["role"] == "user" and message["content"].strip() == prompt.strip() for message in messages)


def split_pair(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """``(prompt, chosen, rejected)`` of a pair whose answers may be whole conversations: all strings, or all messages.

    In published sets chosen and rejected often hold the prompt too, and the field prompt is missing
    (Anthropic/hh-rlhf) or repeats it (HuggingFaceH4/ultrafeedback_binarized). What both begin with is then the prompt.
    """
    if isinstance(chosen, str):
        if isinstance(prompt, list):
            answers = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
            return (_plain(prompt), *answers)
        return (prompt, chosen, rejected) if prompt is not None else _split_strings(chosen, rejected)
    chosen, rejected = _plain(chosen), _plain(rejected)
    if isinstance(prompt, list):
        start = _plain(prompt)
        whole = all(answer[: len(start)] == start and len(answer) > len(start) for answer in (chosen, rejected))
        cut = len(start) if whole else 0
        return start, chosen[cut:], rejected[cut:]
    cut = shared_length(chosen[:-1], rejected[:-1])
    start = chosen[:cut]
    if isinstance(prompt, str) and not any(message["role"] == "user" for message in start):
        start = [*start, {"role": "user", "content": prompt}]
    return start, chosen[cut:], rejected[cut:]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cuts behind the last turn of the assistant that both begin with, else before the first word that differs."""
    shared = chosen[: shared_length(chosen, rejected)]
    marker = shared.rfind(ASSISTANT_TURN)
    if marker >= 0:
        cut = marker + len(ASSISTANT_TURN)
    else:
        cut = max((index for index, character in enumerate(shared) if character.isspace()), default=0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _check_text(field: str, value: object, *, may_be_blank: bool = False) -> Problem | None:
    if not isinstance(value, str):
        return field, f"must be a string, is {kind_of(value)}"
    if not may_be_blank and not value.strip():
        return field, "is empty"
    # JSON may write half of a surrogate pair ("\ud800"), which no tokenizer and no file can take.
    return (field, "is not Unicode text: half of a surrogate pair") if _has_surrogate(value) else None


def _has_surrogate(value: str) -> bool:
    return not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)


def _check_messages(field: str, value: object, *, needs_assistant: bool = False) -> Problem | None:
    if not isinstance(value, list):
        return field, f"must be a list of messages, is {kind_of(value)}"
    if not value:
        return field, "is an empty list"
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            return where, f"must be an object with role and content, is {kind_of(message)}"
        if message.get("role") not in ROLES:
            return f"{where}.role", f"must be one of {', '.join(ROLES)}, is {_show(message.get('role'))}"
        if message.get("tool_calls"):
            return f"{where}.tool_calls", "is not supported; write the call into content"
        if problem := _check_text(f"{where}.content", message.get("content"), may_be_blank=True):
            return problem
    if needs_assistant and not any(message["role"] == "assistant" for message in value):
        return field, "has no message of the assistant, so there is nothing to learn"
    return None


def _check_sharegpt(value: object) -> Problem | None:
    if not isinstance(value, list):
        return "conversations", f"must be a list of turns, is {kind_of(value)}"
    if not value:
        return "conversations", "is an empty list"
    for index, turn in enumerate(value):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            return where, f"must be an object with from and value, is {kind_of(turn)}"
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            return f"{where}.from", f"must be one of {', '.join(SHAREGPT_ROLES)}, is {_show(speaker)}"
        if problem := _check_text(f"{where}.value", turn.get("value"), may_be_blank=True):
            return problem
    if not any(SHAREGPT_ROLES[turn["from"]] == "assistant" for turn in value):
        return "conversations", "has no turn of gpt, so there is nothing to learn"
    return None


def _show(value: object) -> str:
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


def kind_of(value: object) -> str:
    """The JSON type of ``value``, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)

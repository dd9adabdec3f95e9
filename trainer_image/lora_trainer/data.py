"""Reads and checks the dataset. A bad record ends the run before a model is loaded, with its number and the reason."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_api.finetune import Dataset
from lora_trainer.errors import BadDataError
from lora_trainer.sources import Sources

Format = Literal["messages", "prompt-completion", "text"]
Record = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MAX_REPORTED = 20
DEFAULT_EVAL_FRACTION = 0.05

FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Records:
    """Checked records, with the fields of their format and no others."""

    format: Format
    train: list[Record]
    eval: list[Record]

    @property
    def conversational(self) -> bool:
        """Whether records go through the model's chat template."""
        first = self.train[0]
        return self.format == "messages" or isinstance(first.get("prompt"), list)


@dataclass(frozen=True)
class BadRecord:
    """What is wrong with one record. ``number`` counts from 1; in JSONL it is the line."""

    file: str
    number: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: record {self.number}: {self.field}: {self.reason}"


def load_records(dataset: Dataset, sources: Sources) -> Records:
    """All records of a run, split into training and evaluation.

    Raises:
        BadDataError: some record is bad, or too few are left; the message names the first 20 bad ones.
    """
    found, train = read_records(sources.train, dataset.format)
    if sources.eval is not None:
        eval_format, evaluation = read_records(sources.eval, found)
        if eval_format != found:
            raise BadDataError(f"dataset.eval has {eval_format} records, dataset.train {found}")
    else:
        fraction = DEFAULT_EVAL_FRACTION if dataset.eval_fraction is None else dataset.eval_fraction
        train, evaluation = split_records(train, fraction)
    if not train:
        raise BadDataError("dataset.train: no record is left to train on")
    return Records(found, train, evaluation)


def read_records(files: list[Path], declared: str) -> tuple[Format, list[Record]]:
    """Format and records of ``files``. ``declared`` is a format or ``auto``.

    Raises:
        BadDataError: there is no record, or a bad one.
    """
    found: Format | None = None if declared == "auto" else declared  # type: ignore[assignment]
    records: list[Record] = []
    bad: list[BadRecord] = []
    bad_count = 0
    for file in files:
        for number, value in _read_file(file):
            if isinstance(value, BadRecord):
                problem: BadRecord | None = value
            else:
                if found is None:
                    found = detect_format(value)
                problem = _check(file.name, number, value, found)
                if problem is None and found is not None:
                    records.append({field: value[field] for field in FIELDS[found]})
            if problem is not None:
                bad_count += 1
                bad.extend([problem] if len(bad) < MAX_REPORTED else [])
    if bad_count:
        more = f"\n... and {bad_count - len(bad)} more" if bad_count > len(bad) else ""
        noun = "record is" if bad_count == 1 else "records are"
        raise BadDataError(f"{bad_count} {noun} bad:\n" + "\n".join(map(str, bad)) + more)
    if found is None or not records:
        raise BadDataError(f"{', '.join(file.name for file in files)}: there is no record")
    return found, records


def detect_format(value: object) -> Format | None:
    """The format whose fields ``value`` has, or ``None``."""
    if isinstance(value, dict):
        for name, fields in FIELDS.items():
            if all(field in value for field in fields):
                return name
    return None


def _read_file(file: Path) -> Iterator[tuple[int, object]]:
    """``(number, value)`` of each record; the value is a BadRecord where it cannot be read."""
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, BadRecord(file.name, number, "line", f"is not UTF-8: {error.reason}")
            except (ValueError, RecursionError) as error:
                yield number, BadRecord(file.name, number, "line", f"is not JSON: {error}")


def _read_parquet(file: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        number = 0
        with pa.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except pa.ArrowInvalid as error:
        raise BadDataError(f"{file.name}: is not a Parquet file: {error}") from error


def _check(file: str, number: int, value: object, kind: Format | None) -> BadRecord | None:
    """What is wrong with ``value`` as a record of ``kind``, or ``None``."""
    if not isinstance(value, dict):
        return BadRecord(file, number, "record", f"must be an object with fields, is {_kind(value)}")
    if kind is None:
        wanted = "; or ".join(" and ".join(fields) for fields in FIELDS.values())
        has = ", ".join(map(str, value)) or "no fields"
        return BadRecord(file, number, "record", f"has {has}; a record has {wanted}")
    for field in FIELDS[kind]:
        if field not in value or value[field] is None:
            return BadRecord(file, number, field, f"is missing (the format is {kind})")
    if kind == "messages":
        problem = _check_messages("messages", value["messages"], needs_assistant=True)
    elif kind == "prompt-completion":
        problem = _check_pair(value["prompt"], value["completion"])
    else:
        problem = _check_text("text", value["text"])
    return BadRecord(file, number, *problem) if problem else None


def _check_pair(prompt: object, completion: object) -> tuple[str, str] | None:
    if isinstance(prompt, list) != isinstance(completion, list):
        return "completion", f"must have the form of prompt: that is {_kind(prompt)}, this is {_kind(completion)}"
    if isinstance(prompt, list):
        return _check_messages("prompt", prompt) or _check_messages("completion", completion, needs_assistant=True)
    return _check_text("prompt", prompt) or _check_text("completion", completion)


def _check_text(field: str, value: object) -> tuple[str, str] | None:
    if not isinstance(value, str):
        return field, f"must be a string, is {_kind(value)}"
    return None if value.strip() else (field, "is empty")


def _check_messages(field: str, value: object, *, needs_assistant: bool = False) -> tuple[str, str] | None:
    if not isinstance(value, list):
        return field, f"must be a list of messages, is {_kind(value)}"
    if not value:
        return field, "is an empty list"
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            return where, f"must be an object with role and content, is {_kind(message)}"
        if message.get("role") not in ROLES:
            return f"{where}.role", f"must be one of {', '.join(ROLES)}, is {message.get('role')!r}"
        if not isinstance(message.get("content"), str):
            return f"{where}.content", f"must be a string, is {_kind(message.get('content'))}"
    if needs_assistant and not any(message["role"] == "assistant" for message in value):
        return field, "has no message of the assistant, so there is nothing to learn"
    return None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def record_position(record: Record) -> float:
    """Place of ``record`` in [0, 1), from its content alone."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") / 2**64


def split_records(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """``(train, eval)``. Which side a record is on depends on its content alone: rows added later move none.

    Equal records are on one side. Where the fraction selects none, the record that comes next is the evaluation set,
    so that there is always something to measure with.
    """
    if fraction <= 0 or len(records) < 2:
        return records, []
    positions = [record_position(record) for record in records]
    limit = fraction if min(positions) < fraction else min(positions) * (1 + 1e-12) + 1e-300
    train = [record for record, position in zip(records, positions, strict=True) if position >= limit]
    evaluation = [record for record, position in zip(records, positions, strict=True) if position < limit]
    return train, evaluation

"""Reads and checks the dataset. A bad record ends the run before a model is loaded, with its number and the reason."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_api.sources import Dataset
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.formats import FIELDS, Format, Problem, Record, check, convert, detect_format, is_conversation, rename
from lora_trainer.readers import BadRecord, read_file
from lora_trainer.sources import Sources

MAX_REPORTED = 20
MAX_KINDS = 10
DEFAULT_EVAL_FRACTION = 0.05


@dataclass(frozen=True)
class Records:
    """Checked records, each with messages, or prompt and completion, or text. ``format`` is that of the files."""

    format: Format
    train: list[Record]
    eval: list[Record]

    @property
    def conversational(self) -> bool:
        """Whether records go through the model's chat template."""
        return is_conversation(self.train[0])


class _Faults:
    """The first bad records in full, and how many there are of each kind."""

    def __init__(self) -> None:
        self.first: list[BadRecord] = []
        self.kinds: Counter[str] = Counter()

    def add(self, bad: BadRecord) -> None:
        self.kinds[bad.fault] += 1
        if len(self.first) < MAX_REPORTED:
            self.first.append(bad)

    def check(self) -> None:
        """Raises BadDataError where there is one."""
        count = self.kinds.total()
        if not count:
            return
        lines = [f"{count} {'record is' if count == 1 else 'records are'} bad:", *map(str, self.first)]
        if count > len(self.first):
            lines.append(f"... and {count - len(self.first)} more")
        if count > 1:
            lines += ["by kind:", *(f"{number} x {kind}" for kind, number in self.kinds.most_common(MAX_KINDS))]
        raise BadDataError("\n".join(lines).encode("utf-8", "replace").decode())


def load_records(dataset: Dataset, sources: Sources, *, chat: bool = True, objective: str = "sft") -> Records:
    """All records of a run, split into training and evaluation. ``chat``: the model has a chat template.

    Raises:
        BadDataError: some record is bad, or too few are left; the message names the first 20 bad ones.
        BadSpecError: dataset.columns, dataset.systemPrompt or training.objective does not fit the records.
    """
    columns, system_prompt = dataset.columns, dataset.system_prompt
    options = {"chat": chat, "preferences": objective == "dpo"}
    found, train = read_records(sources.train, dataset.format, columns, system_prompt, **options)
    if sources.eval is not None:
        _, evaluation = read_records(sources.eval, found, columns, system_prompt, **options)
        if is_conversation(evaluation[0]) != is_conversation(train[0]):
            raise BadDataError("dataset.eval and dataset.train: one has conversations, the other has plain text")
    else:
        fraction = DEFAULT_EVAL_FRACTION if dataset.eval_fraction is None else dataset.eval_fraction
        train, evaluation = split_records(train, fraction)
    if not train:
        raise BadDataError("dataset.train: no record is left to train on")
    return Records(found, train, evaluation)


def read_records(
    files: list[Path],
    declared: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    *,
    chat: bool = True,
    preferences: bool = False,
) -> tuple[Format, list[Record]]:
    """Format of ``files`` and their converted records. ``declared`` is a format or ``auto``: that of the first record.

    ``preferences``: whether pairs of chosen and rejected answers are wanted (objective dpo), or anything else.

    Raises:
        BadDataError: there is no record, or a bad one.
        BadSpecError: ``columns``, ``system_prompt`` or ``preferences`` does not fit the records.
    """
    found: Format | None = None if declared == "auto" else declared  # type: ignore[assignment]
    records: list[Record] = []
    faults = _Faults()
    for file in files:
        for number, read in read_file(file):
            if isinstance(read, BadRecord):
                faults.add(read)
                continue
            value = rename(read, columns or {})
            found = found or detect_format(value, preferences=preferences)
            if found is not None:
                check_objective(found, preferences=preferences)
            problem = check(value, found)
            if problem is None and found is not None and isinstance(value, dict):
                record = convert(value, found, system_prompt, chat=chat)
                problem = _differs(record, records)
                if problem is None:
                    records.append(record)
            if problem is not None:
                faults.add(BadRecord(file.name, number, *problem))
    faults.check()
    if found is None or not records:
        raise BadDataError(f"{', '.join(file.name for file in files)}: there is no record")
    _check_options(found, records[0], columns or {}, system_prompt)
    return found, records


def check_objective(found: Format, *, preferences: bool) -> None:
    """Refuses records that the objective cannot learn from.

    Raises:
        BadSpecError: pairs for objective sft, or anything else for objective dpo.
    """
    if found == "preference" and not preferences:
        raise BadSpecError(
            "training.objective: sft cannot learn from pairs of chosen and rejected answers (format preference): set "
            "objective to dpo, or choose other fields of the records with dataset.format and dataset.columns"
        )
    if found != "preference" and preferences:
        raise BadSpecError(
            f"training.objective: dpo learns from pairs of chosen and rejected answers, but the records have the "
            f"format {found}: set objective to sft, or name the fields that hold the pairs in dataset.columns "
            "({chosen: ..., rejected: ...})"
        )


def _differs(record: Record, records: list[Record]) -> Problem | None:
    if records and is_conversation(record) != is_conversation(records[0]):
        return "prompt", "must have the form of the first record's: all strings, or all lists of messages"
    return None


def _check_options(found: Format, record: Record, columns: Mapping[str, str], system_prompt: str | None) -> None:
    optional = {"alpaca": ["input"], "preference": ["prompt"]}
    fields = (*optional.get(found, []), *FIELDS[found])
    if unused := [name for name in columns if name not in fields]:
        raise BadSpecError(f"dataset.columns: {', '.join(unused)}: the format {found} has {', '.join(fields)}")
    if system_prompt is not None and not is_conversation(record):
        raise BadSpecError(
            f"dataset.systemPrompt: the records ({found}) are plain text, which has no messages to put it before; "
            "write it into the text, or use conversations with a model that has a chat template"
        )


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

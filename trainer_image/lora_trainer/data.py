"""Reads and checks the dataset. A bad record ends the run before a model is loaded, with its number and the reason."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_api.sources import DataFormat, Dataset
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.formats import FIELDS, Format, Problem, Record, check, convert, detect_format, is_conversation, rename
from lora_trainer.readers import BadRecord, read_file
from lora_trainer.rehearse import rehearse
from lora_trainer.sources import Sources

MAX_REPORTED = 20
MAX_KINDS = 10
MAX_DIFFERENT_KINDS = 1000
OTHER_KINDS = "other faults"
DEFAULT_EVAL_FRACTION = 0.05

NOTHING_TO_TRAIN_ON = "dataset.train: no record is left to train on"
FORMS_DIFFER = "dataset.eval and dataset.train: one has conversations, the other has plain text"


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


class Faults:
    """The first bad records in full, and how many there are of each kind. Its size is bounded."""

    def __init__(self) -> None:
        self.first: list[BadRecord] = []
        self.kinds: Counter[str] = Counter()

    def add(self, bad: BadRecord) -> None:
        """Counts a bad record."""
        known = bad.fault in self.kinds or len(self.kinds) < MAX_DIFFERENT_KINDS
        self.kinds[bad.fault if known else OTHER_KINDS] += 1
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


class Reading:
    """One pass over files: iterating gives ``(record, file, number)`` of each good record, converted.

    Bad ones are counted on the way; ``finish`` tells of them. Nothing but the first record is kept.
    """

    def __init__(
        self,
        files: Sequence[Path],
        declared: DataFormat,
        columns: Mapping[str, str] | None = None,
        system_prompt: str | None = None,
        *,
        chat: bool = True,
        preferences: bool = False,
    ) -> None:
        self.format: Format | None = None if declared == "auto" else declared
        self.first: Record | None = None
        self.faults = Faults()
        self._files, self._columns, self._system_prompt, self._chat = files, columns or {}, system_prompt, chat
        self._preferences = preferences

    def __iter__(self) -> Iterator[tuple[Record, str, int]]:
        """Reads.

        Raises:
            BadDataError: a file as a whole is not what its name says.
            BadSpecError: ``columns``, ``system_prompt`` or ``preferences`` does not fit the records.
        """
        rehearse(self._files)
        for file in self._files:
            for number, read in read_file(file):
                if isinstance(read, BadRecord):
                    self.faults.add(read)
                    continue
                value = rename(read, self._columns)
                self.format = self.format or detect_format(value, preferences=self._preferences)
                if self.format is not None:
                    check_objective(self.format, preferences=self._preferences)
                problem = check(value, self.format)
                if problem is None and self.format is not None and isinstance(value, dict):
                    record = convert(value, self.format, self._system_prompt, chat=self._chat)
                    problem = self._differs(record)
                    if problem is None:
                        yield record, file.name, number
                if problem is not None:
                    self.faults.add(BadRecord(file.name, number, *problem))

    def _differs(self, record: Record) -> Problem | None:
        if self.first is None:
            self._check_options(record)
            self.first = record
        if is_conversation(record) != is_conversation(self.first):
            return "prompt", "must have the form of the first record's: all strings, or all lists of messages"
        return None

    def _check_options(self, record: Record) -> None:
        found = self.format or "text"
        optional = {"alpaca": ["input"], "preference": ["prompt"]}
        fields = (*optional.get(found, []), *FIELDS[found])
        if unused := [name for name in self._columns if name not in fields]:
            raise BadSpecError(f"dataset.columns: {', '.join(unused)}: the format {found} has {', '.join(fields)}")
        if self._system_prompt is not None and not is_conversation(record):
            raise BadSpecError(
                f"dataset.systemPrompt: the records ({found}) are plain text, which has no messages to put it before; "
                "write it into the text, or use conversations with a model that has a chat template"
            )

    def finish(self) -> tuple[Format, Record]:
        """The format and the first record, once all were read.

        Raises:
            BadDataError: there is no record, or a bad one; the message names the first 20 bad ones.
        """
        self.faults.check()
        if self.format is None or self.first is None:
            raise BadDataError(f"{', '.join(file.name for file in self._files)}: there is no record")
        return self.format, self.first


def load_records(dataset: Dataset, sources: Sources, *, chat: bool = True, objective: str = "sft") -> Records:
    """All records of a run, held in memory, split into training and evaluation. ``chat``: there is a chat template.

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
            raise BadDataError(FORMS_DIFFER)
    else:
        train, evaluation = split_records(train, eval_fraction(dataset))
    if not train:
        raise BadDataError(NOTHING_TO_TRAIN_ON)
    return Records(found, train, evaluation)


def eval_fraction(dataset: Dataset) -> float:
    """Share of the training records that is held out, 0 to 0.5."""
    return DEFAULT_EVAL_FRACTION if dataset.eval_fraction is None else dataset.eval_fraction


def read_records(
    files: list[Path],
    declared: DataFormat,
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
    reading = Reading(files, declared, columns, system_prompt, chat=chat, preferences=preferences)
    records = [record for record, _, _ in reading]
    return reading.finish()[0], records


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


def record_position(record: Record) -> float:
    """Place of ``record`` in [0, 1), from its content alone."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") / 2**64


def split_records(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """``(train, eval)``. Which side a record is on depends on its content alone: rows added later move none.

    Equal records are on one side. Where the fraction selects none, the record that comes next is the evaluation set,
    so that there is always something to measure with; a row added later may then take its place.
    """
    positions = [record_position(record) for record in records]
    limit = split_limit(positions, fraction)
    train = [record for record, position in zip(records, positions, strict=True) if position >= limit]
    evaluation = [record for record, position in zip(records, positions, strict=True) if position < limit]
    return train, evaluation


def split_limit(positions: Sequence[float], fraction: float) -> float:
    """Records below this place are held out: ``fraction``, or just above the least place where it selects none."""
    if fraction <= 0 or len(positions) < 2:
        return 0.0
    least = min(positions)
    return fraction if least < fraction else least * (1 + 1e-12) + 1e-300

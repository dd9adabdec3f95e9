"""Reads files of records: JSON (lines), CSV, Parquet, Arrow. What cannot be read is a bad record or BadDataError."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lora_trainer.arrays import ElementTooLongError, NoArrayError, read_array
from lora_trainer.errors import BadDataError
from lora_trainer.inside import find_problem

MAX_RECORD = 16 * 1024 * 1024
"""Bytes, or characters, of the longest record: some millions of tokens, far more than any model is given at once."""

TOO_LONG = f"has more than {MAX_RECORD // 2**20} MiB, the most a record may have"
MAX_REASON = 300

_ARROW_MAGIC = b"ARROW1"
_ROWS = 128
"""Rows that are unpacked at a time."""

_PIECE = 1024 * 1024
_ALWAYS_UNPACKED = 512 * 1024 * 1024
_MOST_UNPACKED = 1000
"""What unpacks to more than so many times its size, and to more than those bytes, is a bomb. Text packs to a tenth, but
rows that all begin with the same long system message or list of tools to some hundredths of that."""


@dataclass(frozen=True)
class BadRecord:
    """What is wrong with one record. ``number`` counts from 1; in JSONL it is the line."""

    file: str
    number: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: record {self.number}: {self.field}: {self.reason[:MAX_REASON]}"

    @property
    def fault(self) -> str:
        """The kind of fault: field and reason without what differs from record to record."""
        return f"{re.sub(r'[0-9]+', '', self.field)}: {re.split(r', is |: |; ', self.reason)[0]}"[:MAX_REASON]


def read_file(file: Path) -> Iterator[tuple[int, object]]:
    """``(number, value)`` of each record; the value is a BadRecord where it is too long or cannot be read.

    All are read in pieces. Parquet and Arrow files may ask for any memory: they are rehearsed before (``rehearse``).

    Raises:
        BadDataError: the file as a whole is not what its name says.
    """
    problem = find_problem(file)
    if problem is not None:
        raise BadDataError(f"{file.name}: {problem}")
    readers = {".parquet": _read_parquet, ".arrow": _read_arrow, ".csv": _read_csv, ".json": _read_json}
    yield from readers.get(file.suffix, _read_lines)(file)


def _read_lines(file: Path) -> Iterator[tuple[int, object]]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_RECORD + 1):
            number += 1
            if len(line) > MAX_RECORD and not line.endswith(b"\n"):
                yield number, BadRecord(file.name, number, "line", TOO_LONG)
                while rest := lines.readline(_PIECE):
                    if rest.endswith(b"\n"):
                        break
                continue
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield number, BadRecord(file.name, number, "line", f"is not UTF-8: {error.reason}")
            except (ValueError, RecursionError) as error:
                yield number, BadRecord(file.name, number, "line", f"is not JSON: {error}")


def _read_json(file: Path) -> Iterator[tuple[int, object]]:
    try:
        with file.open("rb") as content:
            yield from enumerate(read_array(content, MAX_RECORD), start=1)
    except UnicodeDecodeError as error:
        raise BadDataError(f"{file.name}: is not UTF-8: {error.reason}") from error
    except NoArrayError as error:
        where = f"record {error.number}: " if error.number else ""
        raise BadDataError(f"{file.name}: {where}{error}") from error
    except ElementTooLongError as error:
        raise BadDataError(f"{file.name}: record {error.number}: {TOO_LONG}") from error


class _RowTooLongError(Exception):
    """A row of a CSV file, which may be several lines, is longer than a record may be."""


class _Lines:
    """Lines of a text, for one row after the other."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.left = MAX_RECORD

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise _RowTooLongError
        if not line:
            raise StopIteration
        return line


def _read_csv(file: Path) -> Iterator[tuple[int, object]]:
    """Rows below the header, by its names. Behind a row that is too long nobody knows where the next one begins."""
    csv.field_size_limit(MAX_RECORD)
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            lines = _Lines(text)
            rows = csv.reader(lines, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise BadDataError(f"{file.name}: two columns of the header have the same name")
            for cells in rows:
                lines.left = MAX_RECORD
                if not cells:
                    continue
                number += 1
                if len(cells) > len(header):
                    reason = f"has more cells than the header, is {len(cells)} wide"
                    yield number, BadRecord(file.name, number, "row", reason)
                    continue
                yield number, dict(zip(header, cells, strict=False))
    except _RowTooLongError:
        yield number + 1, BadRecord(file.name, number + 1, "row", f"{TOO_LONG}; the rows behind it were not read")
    except UnicodeDecodeError as error:
        yield number + 1, BadRecord(file.name, number + 1, "row", f"is not UTF-8: {error.reason}")
    except csv.Error as error:
        yield number + 1, BadRecord(file.name, number + 1, "row", f"is not CSV: {error}")


def _read_parquet(file: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_PIECE) as table:
            batches = table.iter_batches(batch_size=_ROWS, use_threads=False)
            yield from _read_batches(file, batches, table.metadata.num_rows)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadDataError(f"{file.name}: is not a Parquet file: {error}") from error


def _read_arrow(file: Path) -> Iterator[tuple[int, object]]:
    """Arrow streams, as datasets writes them, and Arrow files. Not mapped: that takes addresses for the whole file."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(file)) as source:
            is_file = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            source.seek(0)
            if is_file:
                table = pa.ipc.open_file(source)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(source))
            yield from _read_batches(file, batches)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadDataError(f"{file.name}: is not an Arrow file: {error}") from error


def _read_batches(file: Path, batches: Iterator[Any], promised: int = 0) -> Iterator[tuple[int, object]]:
    """The rows of Arrow's record batches, a few at a time; each alone where together they may be large.

    Raises:
        BadDataError: there are more of them, or they are larger, than a file of its size has.
    """
    number = unpacked = 0
    size = file.stat().st_size
    for batch in batches:
        _check_rows(file, max(promised, number + batch.num_rows), size)
        batch.validate(full=True)
        repeats = any(map(_repeats, batch.schema.types))
        unpacked += 0 if repeats else batch.nbytes
        _check_unpacked(file, unpacked, size)
        rows = _ROWS if batch.nbytes <= MAX_RECORD and not repeats else 1
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            if rows == 1 and not repeats and part.nbytes > MAX_RECORD:
                number += 1
                yield number, BadRecord(file.name, number, "row", TOO_LONG)
                continue
            for value in part.to_pylist():
                number += 1
                weight = _weigh(value) if repeats else 0
                unpacked += weight
                _check_unpacked(file, unpacked, size)
                yield number, value if weight <= MAX_RECORD else BadRecord(file.name, number, "row", TOO_LONG)


def _check_unpacked(file: Path, unpacked: int, size: int) -> None:
    if unpacked > max(_ALWAYS_UNPACKED, _MOST_UNPACKED * size):
        raise BadDataError(f"{file.name}: unpacks to more than {_MOST_UNPACKED} times its {size} bytes")


def _weigh(value: object) -> int:
    """About how many bytes ``value`` has."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_weigh, value.values()))
    return 8 + sum(map(_weigh, value)) if isinstance(value, list) else 8


def _check_rows(file: Path, rows: int, size: int) -> None:
    """A row that takes less than a bit is no record; counts of 2^62 rows fit into a few bytes."""
    if rows > 8 * size:
        raise BadDataError(f"{file.name}: is said to have {rows} rows, in {size} bytes")


def _repeats(kind: Any) -> bool:
    """Whether values of an Arrow type may stand for others that are stored once, so that their size says nothing."""
    import pyarrow as pa

    tests = (pa.types.is_dictionary, pa.types.is_run_end_encoded, pa.types.is_list_view, pa.types.is_large_list_view)
    if any(test(kind) for test in (*tests, pa.types.is_string_view, pa.types.is_binary_view)):
        return True
    return any(_repeats(kind.field(index).type) for index in range(kind.num_fields))

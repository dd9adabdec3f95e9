"""Reads files of records: JSON (lines), CSV, Parquet, Arrow. What cannot be read is a bad record or BadDataError."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.errors import BadDataError

MAX_REASON = 300
_ARROW_MAGIC = b"ARROW1"
MAX_CELL = 2**31 - 1
"""Characters of one CSV cell: the csv module's own bound of 131,072 is less than a long conversation has."""


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
    """``(number, value)`` of each record; the value is a BadRecord where it cannot be read.

    All are read in pieces, but for JSON. A .json file is held in memory as a whole.

    Raises:
        BadDataError: the file as a whole is not what its name says.
    """
    if not file.is_file():
        raise BadDataError(f"{file.name}: is no file")
    readers = {".parquet": _read_parquet, ".arrow": _read_arrow, ".csv": _read_csv, ".json": _read_json}
    yield from readers.get(file.suffix, _read_lines)(file)


def _read_lines(file: Path) -> Iterator[tuple[int, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
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
        records = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadDataError(f"{file.name}: is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"{file.name}: is not JSON: {error}; a file with one object a line is a .jsonl") from error
    if not isinstance(records, list):
        raise BadDataError(f"{file.name}: must be one array of objects")
    yield from enumerate(records, start=1)


def _read_csv(file: Path) -> Iterator[tuple[int, object]]:
    """Rows below the header, by its names."""
    csv.field_size_limit(MAX_CELL)
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise BadDataError(f"{file.name}: two columns of the header have the same name")
            for cells in rows:
                if not cells:
                    continue
                number += 1
                if len(cells) > len(header):
                    reason = f"has more cells than the header, is {len(cells)} wide"
                    yield number, BadRecord(file.name, number, "row", reason)
                    continue
                yield number, dict(zip(header, cells, strict=False))
    except UnicodeDecodeError as error:
        yield number + 1, BadRecord(file.name, number + 1, "row", f"is not UTF-8: {error.reason}")
    except csv.Error as error:
        yield number + 1, BadRecord(file.name, number + 1, "row", f"is not CSV: {error}")


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
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadDataError(f"{file.name}: is not a Parquet file: {error}") from error


def _read_arrow(file: Path) -> Iterator[tuple[int, object]]:
    """Arrow streams, as datasets writes them, and Arrow files."""
    import pyarrow as pa

    try:
        number = 0
        with pa.memory_map(str(file)) as source:
            is_file = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            source.seek(0)
            if is_file:
                table = pa.ipc.open_file(source)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(source))
            for batch in batches:
                for start in range(0, batch.num_rows, 1024):
                    for value in batch.slice(start, 1024).to_pylist():
                        number += 1
                        yield number, value
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadDataError(f"{file.name}: is not an Arrow file: {error}") from error

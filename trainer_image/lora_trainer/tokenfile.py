"""Tokens on the scratch disk: written once in a stream, then mapped into memory, whatever their number.

An Arrow stream (arrow.apache.org/docs/format/Columnar.html) with a row a record: ``ids``, ``learned`` (the ranges of
positions that are learned, flat) and ``place`` (of the record in [0, 1), which the split goes by).
"""

import bisect
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_trainer.tokens import Document

SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.int32())), ("place", pa.float64())])


class TokenWriter:
    """Writes documents to a file, and knows the digest of what it wrote."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._hash = hashlib.sha256()

    def write(self, documents: Sequence[Document], places: Sequence[float]) -> None:
        """Adds documents."""
        if not documents:
            return
        columns = [
            _lists([document.ids for document in documents]),
            _lists([document.learned.reshape(-1) for document in documents]),
            pa.array(places, pa.float64()),
        ]
        for column in columns[:2]:
            self._hash.update(column.offsets.to_numpy())
            self._hash.update(column.values.to_numpy())
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def digest(self) -> str:
        """SHA-256 of all tokens so far, in hexadecimal digits. It depends on how they were put into batches."""
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._file.close()


def _lists(rows: Sequence[NDArray[np.int32]]) -> Any:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


class TokenFile:
    """The documents of a file. Only what is read comes into memory, and the kernel may drop it again."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batches = list(reader)
        self._ids = [_views(batch.column("ids")) for batch in batches]
        self._learned = [_views(batch.column("learned")) for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self.places: NDArray[np.float64] = _joined([batch.column("place").to_numpy() for batch in batches], np.float64)
        self.lengths: NDArray[np.int32] = _joined([np.diff(offsets) for offsets, _ in self._ids], np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Document:
        """The document with that number, counted from 0."""
        batch = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[batch]
        return Document(_row(self._ids[batch], row), _row(self._learned[batch], row).reshape(-1, 2))


def _views(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return column.offsets.to_numpy(), column.values.to_numpy()


def _row(column: tuple[NDArray[np.int32], NDArray[np.int32]], row: int) -> NDArray[np.int32]:
    offsets, values = column
    return values[offsets[row] : offsets[row + 1]]


def _joined(parts: list[Any], kind: Any) -> Any:
    return np.concatenate(parts).astype(kind) if parts else np.zeros(0, dtype=kind)

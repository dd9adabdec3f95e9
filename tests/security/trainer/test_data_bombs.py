"""Files of records that ask for more memory than they have bytes: refused by name, within bounds."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_trainer.data import read_records
from lora_trainer.errors import BadDataError
from lora_trainer.preflight import preflight
from lora_trainer.readers import MAX_RECORD, read_file
from lora_trainer.rehearse import MEMORY
from tests.trainer.runs import ROOT, SOURCES

MIB = 2**20
MOST_SECONDS = 60.0
"""Some seconds, on a machine that has nothing else to do."""
MOST_OWN = 500.0
"""MiB of the process that trains: far less than the files ask for. The one that rehearses may have MEMORY."""

MOST_CHILD = MEMORY / MIB + 200


def attack(file: Path) -> dict[str, Any]:
    """What reading ``file`` says, in a process of its own. It took neither much time nor much memory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*SOURCES, ROOT)))}
    command = [sys.executable, "-m", "tests.security.trainer.reader", f"file://{file}"]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert time.monotonic() - began < MOST_SECONDS
    assert found["own"] < MOST_OWN, found
    assert found["child"] < MOST_CHILD, found
    return found


def fill(file: Path, start: bytes, end: bytes, size: int = 100 * MIB, piece: bytes = b"x" * MIB) -> None:
    with file.open("wb") as out:
        out.write(start)
        for _ in range(size // len(piece)):
            out.write(piece)
        out.write(end)


def long_line(file: Path) -> None:
    fill(file, b'{"text": "a"}\n{"text": "', b'"}\n{"text": 3}\n')


def long_line_without_end(file: Path) -> None:
    fill(file, b'{"text": "a"}\n{"text": "', b"")


def long_element(file: Path) -> None:
    fill(file, b'[{"text": "a"}, {"text": "', b'"}]')


def long_cell(file: Path) -> None:
    fill(file, b"text\na\n", b"\nb\n")


def long_cell_of_many_lines(file: Path) -> None:
    fill(file, b'text\na\n"', b'"\nb\n', 20 * MIB, piece=b"x" * 1023 + b"\n")


def wide_row(file: Path) -> None:
    fill(file, b"text\na\n", b"\nb\n", 20 * MIB, piece=b"x," * 512)


def long_parquet_cell(file: Path) -> None:
    pa.parquet.write_table(pa.table({"text": ["a", "x" * (100 * MIB)]}), file, compression="zstd")


def long_arrow_cell(file: Path) -> None:
    table = pa.table({"text": ["a", "x" * (100 * MIB)]})
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


LONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a line of JSON lines": ("jsonl", long_line, "a.jsonl: record 2: line: "),
    "a line that never ends": ("jsonl", long_line_without_end, "a.jsonl: record 2: line: "),
    "an element of an array": ("json", long_element, "a.json: record 2: "),
    "a cell of a table": ("csv", long_cell, "a.csv: record 2: row: "),
    "a cell of many lines": ("csv", long_cell_of_many_lines, "a.csv: record 2: row: "),
    "a row of many cells": ("csv", wide_row, "a.csv: record 2: row: "),
    "a cell of a Parquet file": ("parquet", long_parquet_cell, "a.parquet: record 2: row: "),
    "a cell of an Arrow stream": ("arrow", long_arrow_cell, "a.arrow: record 2: row: "),
}


@pytest.mark.parametrize("case", LONG)
def test_a_record_of_100_mb_is_refused_by_its_number(case: str, tmp_path: Path) -> None:
    """Attack: who writes the dataset puts 100 MB into one record."""
    suffix, write, want = LONG[case]
    file = tmp_path / f"a.{suffix}"
    write(file)
    found = attack(file)
    assert found["class"] == FailureClass.BAD_DATA, found
    assert want in found["message"]
    assert "has more than 16 MiB, the most a record may have" in found["message"]


def test_lines_behind_a_long_one_are_read(tmp_path: Path) -> None:
    """Attack: who writes the dataset hides bad records behind one that is too long."""
    long_line(tmp_path / "a.jsonl")
    numbers = [number for number, _ in read_file(tmp_path / "a.jsonl")]
    assert numbers == [1, 2, 3]


def test_preflight_says_the_same_of_a_long_record(make_run: Callable[..., RunSpec], tmp_path: Path) -> None:
    """Attack: who writes the dataset puts 17 MB into one record, which preflight meets first."""
    file = tmp_path / "a.jsonl"
    fill(file, b'{"text": "a"}\n{"text": "', b'"}\n', MAX_RECORD + MIB)
    run = make_run(dataset={"train": {"uri": f"file://{file}"}, "eval": None})
    result = preflight(json.dumps(run.to_wire()), "run.json", tmp_path / "work")
    [problem] = [one for one in result.problems if one.failure_class == FailureClass.BAD_DATA]
    assert "a.jsonl: record 2: line: has more than 16 MiB, the most a record may have" in problem.message


@pytest.mark.parametrize("record", ['{"text": "%s"}' % ("x" * 1000), '{"text": ["%s"]}' % ("\\u00e9" * 300)])
def test_an_array_of_80_mb_takes_no_more_memory_than_a_small_one(record: str, tmp_path: Path) -> None:
    """Attack: who writes the dataset writes 80 MB as one array, which used to be held in memory as a whole."""
    file, count = tmp_path / "a.json", 80_000 * 1000 // len(record)
    with file.open("w") as out:
        out.write("\ufeff [")
        out.write(",\n".join([record] * 1000))
        for _ in range(count // 1000 - 1):
            out.write(",\n" + ",\n".join([record] * 1000))
        out.write("]\n")
    code = "import sys; from pathlib import Path; from lora_trainer.readers import read_file\n"
    code += "from tests.security.trainer.reader import most_memory\n"
    code += "print(sum(1 for _ in read_file(Path(sys.argv[1]))), most_memory())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*SOURCES, ROOT)))}
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    records, peak = map(float, done.stdout.split())
    assert records == count // 1000 * 1000
    assert peak < 120


def test_a_dictionary_that_rows_repeat(tmp_path: Path) -> None:
    """Attack: who writes the dataset stores 80 MB once and has 20 000 rows refer to it: 200 GB in a small file."""
    file = tmp_path / "a.parquet"
    order = Random(0).choices(range(8), k=20_000)
    text = pa.DictionaryArray.from_arrays(pa.array(order, pa.int32()), ["x" * (10 * MIB) + str(n) for n in range(8)])
    pa.parquet.write_table(
        pa.table({"text": text}), file, compression="zstd", dictionary_pagesize_limit=200 * MIB, write_statistics=False
    )
    assert file.stat().st_size < MIB
    refuses(file)


def test_rows_that_share_a_long_system_message_are_read(tmp_path: Path) -> None:
    """No attack: records of one agent repeat its list of tools, which Parquet stores once for many rows."""
    file, rows = tmp_path / "a.parquet", 90_000
    random = Random(0)
    tools = json.dumps([f"tool {random.random()}" for _ in range(250)])
    asked = [f"{random.random()} {random.random()}" for _ in range(rows)]
    pa.parquet.write_table(pa.table({"system": [tools] * rows, "text": asked}), file, row_group_size=10_000)
    assert 100 * file.stat().st_size < 512 * MIB < rows * len(tools)
    assert sum(1 for _ in read_file(file)) == rows


def test_one_row_that_repeats_a_dictionary(tmp_path: Path) -> None:
    """Attack: who writes the dataset has one row hold the same 10 MB 20 000 times."""
    file = tmp_path / "a.arrow"
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["x" * (10 * MIB)])
    table = pa.table({"text": pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), words)})
    with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(table)
    assert file.stat().st_size < MIB
    refuses(file)


def test_a_buffer_that_lies_about_its_size(tmp_path: Path) -> None:
    """Attack: who writes the dataset says of a compressed buffer of some bytes that it unpacks to 64 GiB."""
    file = tmp_path / "a.arrow"
    table = pa.table({"text": ["x" * 54321]})
    with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(table)
    true, lie = (54321).to_bytes(8, "little"), (2**36).to_bytes(8, "little")
    content = file.read_bytes()
    assert true in content
    file.write_bytes(content.replace(true, lie))
    found = attack(file)
    assert found["class"] == FailureClass.BAD_DATA, found
    assert "a.arrow: " in found["message"]


def test_a_large_file_of_small_batches_is_read(tmp_path: Path) -> None:
    """No attack: an Arrow file may be larger than the memory in which it is read."""
    file = tmp_path / "a.arrow"
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    os.truncate(file, 2 * MEMORY)  # behind the end of the stream, and with no block on the disk
    _, records = read_records([file], "text")
    assert len(records) == 2


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_more_rows_than_bytes(suffix: str, tmp_path: Path) -> None:
    """Attack: who writes the dataset writes 2^31 rows of nothing, which take an hour to read."""
    file, rows = tmp_path / f"a.{suffix}", 2**31 - 1
    if suffix == "arrow":
        batch = pa.record_batch([pa.Array.from_buffers(pa.null(), rows, [None])], names=["text"])
        with pa.ipc.new_file(file, batch.schema) as out:
            out.write_batch(batch)
    else:
        rows = 10**7
        pa.parquet.write_table(pa.table({"text": pa.nulls(rows, pa.string())}), file)
    with pytest.raises(BadDataError, match=rf"a\.{suffix}: is said to have {rows} rows, in [0-9]+ bytes"):
        read_records([file], "text")


def test_a_footer_that_lies_about_its_size(tmp_path: Path) -> None:
    """Attack: who writes the dataset says that the footer of a Parquet file has 4 GB, or that there is none."""
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a"]}), file)
    content = file.read_bytes()
    for length in (2**32 - 1, len(content), 0):
        file.write_bytes(content[:-8] + length.to_bytes(4, "little") + b"PAR1")
        with pytest.raises(BadDataError, match=r"a\.parquet: is not a Parquet file"):
            read_records([file], "text")


def test_archives_are_not_read(tmp_path: Path) -> None:
    """Attack: who writes the dataset uploads an archive that unpacks to gigabytes. Nothing here unpacks any."""
    for suffix in ("jsonl.gz", "jsonl.zst", "zip", "tar", "tar.gz", "json.bz2", "parquet.gz"):
        (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(bytes(10 * MIB)))
    found = attack(tmp_path)
    assert found["class"] == FailureClass.MODEL_NOT_FOUND
    assert "no .jsonl, .json, .csv, .parquet, .arrow file there" in found["message"]


def refuses(file: Path) -> None:
    found = attack(file)
    assert found["class"] == FailureClass.BAD_DATA, found
    assert found["message"].startswith(
        (f"{file.name}: cannot be read in 1024 MiB of memory", f"{file.name}: unpacks to")
    )

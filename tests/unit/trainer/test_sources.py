"""Which files of a mounted directory are read."""

from pathlib import Path

import pytest

from lora_api.sources import DataSource
from lora_trainer.errors import ModelNotFoundError
from lora_trainer.sources import fetch_data

CASES: dict[str, tuple[list[str], list[str]]] = {
    "in the order of their names": (["b.jsonl", "a.jsonl"], ["a.jsonl", "b.jsonl"]),
    "below directories too": (["part/1.parquet"], ["part/1.parquet"]),
    "a description beside records": (["dataset_info.json", "rows.parquet"], ["rows.parquet"]),
    "arrays alone": (["a.json", "b.json"], ["a.json", "b.json"]),
    "nothing else": (["README.md", "rows.csv"], ["rows.csv"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_directory_is_read(case: str, tmp_path: Path) -> None:
    there, want = CASES[case]
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = fetch_data(DataSource(uri=f"file://{tmp_path}"), tmp_path / "target")
    assert [file.relative_to(tmp_path).as_posix() for file in found] == want


def test_a_directory_without_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFoundError, match=tmp_path.name):
        fetch_data(DataSource(uri=f"file://{tmp_path}"), tmp_path / "target")

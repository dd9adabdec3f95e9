"""docs/decisions/035 names what libraries decide by the kind of a device: it is held to the installed sources.

An upgrade that moves a line shows here which; one that adds a decision shows in a count. Then the row is read again.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gputypes.table import PARALLELISM, ROWS

ROOT = Path(__file__).parents[3]
RECORD = (ROOT / "docs" / "decisions" / "035-what-libraries-decide-by-the-device.md").read_text(encoding="utf-8")
NEAR = 3
"""Lines by which a quote may have moved. More is for a person to look at."""

DECIDES = re.compile(
    r"\.device\.type|distributed_type (==|!=|in|not in|is)|parallel_mode (==|!=)|\bn_gpu\b|multi_device|"
    r"cuda\.is_available\(\)|nn\.DataParallel|DistributedDataParallel\("
)


def read_rows() -> list[list[str]]:
    """Cells of the rows that begin with FILE:LINE."""
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in RECORD.splitlines() if re.match(r"\| \w[\w/]*\.py:\d+ ", line)
    ]
    return [[cell.strip() for cell in row] for row in rows]


def read_counts() -> list[tuple[str, int]]:
    """Files, and how many of their lines decide something by the device."""
    found = re.findall(r"^\| (\w[\w/]*\.py) \| (\d+) \|$", RECORD, re.MULTILINE)
    return [(path, int(count)) for path, count in found]


def source(path: str) -> list[str]:
    """Lines of a file of an installed package."""
    package, _, rest = path.partition("/")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / rest).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: row[0])
def test_what_is_quoted_is_there(row: list[str]) -> None:
    path, _, number = row[0].partition(":")
    quote = row[1].strip("`").replace("\\|", "|")
    lines = source(path)
    near = lines[max(0, int(number) - 1 - NEAR) : int(number) + NEAR]
    elsewhere = [index for index, line in enumerate(lines, 1) if quote in line]
    assert any(quote in line for line in near), f"{quote} is in lines {elsewhere}"


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: row[0])
def test_its_case_is_one_of_the_lane(row: list[str]) -> None:
    cases = re.findall(r"`([^`]+)`", row[4])
    if row[4].startswith("not "):
        return
    assert cases
    for case in cases:
        assert case in {"all", *PARALLELISM, *ROWS} or (ROOT / case).is_file(), case


@pytest.mark.parametrize(("path", "count"), read_counts())
def test_no_decision_was_added(path: str, count: int) -> None:
    found = [f"{number}: {line.strip()}" for number, line in enumerate(source(path), 1) if DECIDES.search(line)]
    assert len(found) == count, "\n".join(found)


def test_the_record_has_rows_of_each_library() -> None:
    assert {row[0].partition("/")[0] for row in read_rows()} == {"transformers", "trl", "accelerate", "torch"}
    assert {path for path, _ in read_counts()} >= {
        row[0].partition(":")[0] for row in read_rows() if not row[0].startswith("torch/")
    }

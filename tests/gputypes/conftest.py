"""What all processes of the lane trained, once."""

from pathlib import Path
from typing import Any

import pytest

from tests.gputypes.table import NEW_TOKENS, ROWS, Row
from tests.support.families import make_family
from tests.support.tiny import make_rows, write_rows
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import build_run

WORKERS = 4
MODULE = "tests.gputypes.work"
RECORDS = 80
LIMIT_SECONDS = 1200
"""Of all rows together; four times what they take on two cores of their own."""
LAST_STEP = 2
"""Of a run that is stopped: the one after which its ranks agree to stop."""

Results = dict[str, list[dict[str, Any]]]
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of each row saw, by the row's name. Only rows are trained that the chosen tests ask for."""
    directory = tmp_path_factory.mktemp("lane")
    names = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    chosen = {name: row for name, row in ROWS.items() if name in names}
    rows = chosen | {row.alone.name: row.alone for row in chosen.values()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SURROUNDINGS, "TMPDIR": str(directory)}.items():
            patch.setenv(name, value)
        return train_rows(list(rows.values()), directory)


def train_rows(rows: list[Row], directory: Path) -> Results:
    """Trains ``rows`` in four processes, side by side where they have room."""
    for objective in ("sft", "dpo", "newTokens"):
        write_rows(directory / objective / "train.jsonl", make_records(objective))
    for family in {row.family for row in rows}:
        make_family(family, directory / "models" / family)
    cases, free = [Case("talk", "talk", list(range(WORKERS)), {}, module=MODULE)], 0
    for row in sorted(rows, key=lambda row: -row.processes):
        processes = [(free + number) % WORKERS for number in range(row.processes)]
        free = (free + row.processes) % WORKERS
        cases += build_cases(row, sorted(processes), directory)
    return run_cases(cases, directory / "out", timeout=LIMIT_SECONDS)


def make_records(objective: str) -> list[dict[str, str]]:
    """Records for an objective; packing has those of sft."""
    rows = make_rows(RECORDS)
    if objective == "dpo":
        return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    if objective == "newTokens":
        first, last = NEW_TOKENS
        return [{"prompt": first + row["prompt"], "completion": row["completion"] + last} for row in rows]
    return rows


def build_cases(row: Row, processes: list[int], directory: Path) -> list[Case]:
    """The attempts of a row."""
    own = directory / "runs" / row.name
    data = directory / ("sft" if row.objective == "packing" else row.objective)
    run = build_run(directory / "models" / row.family, data, own, row.changes()).to_wire()
    attempts: list[tuple[str, dict[str, Any]]] = [(row.name, {"run": run})]
    if row.resumed:
        first = (f"{row.name}-first", {"run": run, "stop_after": LAST_STEP - 1})
        attempts = [first, (row.name, {"run": run | {"attempt": 2}})]
    return [
        Case(name, "learn", processes, {"directory": str(own), **arguments}, module=MODULE)
        for name, arguments in attempts
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here train for real."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.trainer)

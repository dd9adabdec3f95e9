"""What deleted runs have left in the store: what goes, what stays, and what is said."""

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import ExpiryMarker
from lora_api.run import RunSpec
from lora_trainer.cli import main
from lora_trainer.errors import BadSpecError
from lora_trainer.store import Store
from lora_trainer.sweep import sweep_name
from lora_trainer.sweepcli import read_alive
from tests.unit.trainer.checkpoints import make_run, save

HOUR = 3600
HERE = "team/new/checkpoints"


def keep(
    store: Path, place: str, step: int, *, complete: float, written: float | None = None, hours: int = 24,
    expires: float | None = None, run: str | None = "new",
) -> None:  # fmt: skip
    """A checkpoint that was ``complete`` so many hours ago; ``written``: its expiry, so many hours ago, too.

    ``expires`` hours from now by the clock of the pod, whose clock is right unless it is given.
    """
    now = time.time()
    directory = save(store, place, step, run=run, retain_hours=hours)
    times = {"COMPLETE.json": complete, "adapter.safetensors": complete}
    if written is not None:
        left = hours - written if expires is None else expires
        marker = ExpiryMarker(
            run=run or "", expires_at=datetime.now(UTC) + timedelta(hours=left), retain_hours=hours, why="Checkpointed"
        )
        (directory / "EXPIRES.json").write_text(json.dumps(marker.to_wire()))
        times["EXPIRES.json"] = written
    for name, ago in times.items():
        os.utime(directory / name, (now - ago * HOUR, now - ago * HOUR))


def swept(store: Path, run: RunSpec | None = None) -> set[str]:
    """The folders that a new attempt deletes whole; from others it takes nothing."""
    run = run or make_run(store)
    before = Store(run.publish.store).sizes()
    said = sweep_name(Store(run.publish.store), run, f"{HERE}/own/probe")
    after = Store(run.publish.store).sizes()
    gone = {folder_of(path) for path in before.keys() - after.keys()}
    assert not gone & {folder_of(path) for path in after}, "one that is deleted is deleted whole"
    assert after.keys() <= before.keys(), "the probe is gone"
    assert len(said) == len(gone)
    assert all(any(f"{path}: step " in line for line in said) for path in gone)
    return gone


def folder_of(path: str) -> str:
    return "/".join(path.split("/")[:4])


# A sentence that says the case: what a checkpoint of a run that is gone is like, and whether it goes.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "its expiry is over": ({"complete": 100, "written": 25}, True),
    "its expiry is to come": ({"complete": 100, "written": 23}, False),
    "it was killed, and its time is over": ({"complete": 25}, True),
    "it was killed, and its time is to come": ({"complete": 23}, False),
    "its own time counts, not that of the run that looks": ({"complete": 200, "hours": 300}, False),
    "the pod's clock was behind: that of the store counts": ({"complete": 30, "written": 2, "expires": -20}, False),
    "the pod's clock was ahead: it is kept for longer": ({"complete": 50, "written": 30, "expires": 5}, False),
    "somebody prolonged it": ({"complete": 50, "written": 30, "expires": 500}, False),
    "it is of a run of another name, which may be alive": ({"complete": 99, "written": 98, "run": "other"}, False),
    "it is of an older trainer, which wrote no name": ({"complete": 999, "run": None}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_an_attempt_deletes(case: str, tmp_path: Path) -> None:
    what, goes = CASES[case]
    keep(tmp_path, f"{HERE}/gone", 4, **what)
    assert swept(tmp_path) == ({f"{HERE}/gone"} if goes else set())


def test_one_that_has_not_expired_keeps_all_of_its_run(tmp_path: Path) -> None:
    keep(tmp_path, f"{HERE}/a", 2, complete=500)
    keep(tmp_path, f"{HERE}/a", 4, complete=2)
    keep(tmp_path, f"{HERE}/b", 2, complete=500)
    keep(tmp_path, f"{HERE}/b", 4, complete=400, written=300)
    keep(tmp_path, "team/other/checkpoints/c", 4, complete=500)
    keep(tmp_path, f"{HERE}/own", 4, complete=500, written=400)
    assert swept(tmp_path) == {f"{HERE}/b"}


NAMED: dict[str, tuple[dict[str, str], set[str]]] = {
    "all of the name": ({"name": "new"}, set()),
    "one run": ({"uri": f"{HERE}/a"}, {"b"}),
    "one step": ({"uri": f"{HERE}/a/step-4"}, {"b"}),
    "another name": ({"name": "old"}, {"a", "b"}),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_a_run_goes_on_from_is_never_deleted(case: str, tmp_path: Path) -> None:
    resume, gone = NAMED[case]
    for uid in ("a", "b"):
        keep(tmp_path, f"{HERE}/{uid}", 4, complete=500)
    if "uri" in resume:
        resume = {"uri": f"file://{tmp_path}/{resume['uri']}"}
    assert swept(tmp_path, make_run(tmp_path, resume)) == {f"{HERE}/{uid}" for uid in gone}


def test_a_deletion_that_was_cut_is_finished_by_the_next(tmp_path: Path) -> None:
    for step in (2, 4):
        keep(tmp_path, f"{HERE}/gone", step, complete=100, written=50)
    shutil.rmtree(tmp_path / HERE / "gone/step-2")
    (tmp_path / HERE / "gone/step-4/COMPLETE.json").unlink()
    uri = f"file://{tmp_path}"
    assert len(sweep_name(Store(uri), make_run(tmp_path), f"{HERE}/own/probe")) == 1
    assert Store(uri).sizes() == {}


# -- the command


def run_command(store: Path, alive: str, *more: str) -> int:
    (store.parent / "alive").write_text(alive)
    return main(["sweep", f"file://{store}", "--alive", str(store.parent / "alive"), *more])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A dead run of each kind, and an adapter."""
    store = tmp_path / "store"
    keep(store, f"{HERE}/expired", 2, complete=100, written=50)
    keep(store, f"{HERE}/expired", 4, complete=99, written=50)
    keep(store, f"{HERE}/fresh", 4, complete=5, written=1)
    keep(store, "team/x/checkpoints/foreign", 4, complete=400, run="other")
    keep(store, "b/old/checkpoints/unnamed", 4, complete=400, run=None, hours=None)  # type: ignore[arg-type]
    rest = store / "b/old/checkpoints/rest/step-9/adapter.safetensors"
    rest.parent.mkdir(parents=True)
    rest.write_bytes(b"of a save that was cut")
    os.utime(rest, (1e9, 1e9))
    (store / "team/new/sha256-00").mkdir()
    (store / "team/new/sha256-00/manifest.json").write_text("{}")
    return store


def left(store: Path) -> set[str]:
    return {path.split("/")[3] if "checkpoints" in path else path for path in Store(f"file://{store}").sizes()}


ADAPTER = "team/new/sha256-00/manifest.json"


def test_the_command_deletes_what_has_expired_of_runs_that_are_not_alive(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(store, "some-other\n") == 0
    assert left(store) == {"fresh", ADAPTER}
    said = capsys.readouterr().out
    assert f"deleted file://{store}/{HERE}/expired: step 2, 4, 0.0 MB, expired 20" in said
    assert f"kept file://{store}/{HERE}/fresh: step 4, 0.0 MB, kept until 20" in said
    assert f"deleted file://{store}/b/old/checkpoints/rest: nothing complete" in said
    assert f"5 runs have checkpoints in file://{store}: deleted those of 4 (0.0 MB), kept those of 1 that" in said


def test_runs_that_are_alive_keep_theirs_but_not_one_that_has_ended(store: Path) -> None:
    assert run_command(store, "expired Suspended\nforeign <none>\nunnamed  Failed\nrest Succeeded\n\n") == 0
    assert left(store) == {"expired", "fresh", "foreign", ADAPTER}
    assert run_command(store, "expired\nforeign Running\nfresh Failed") == 0
    assert left(store) == {"expired", "fresh", "foreign", ADAPTER}, "what has not expired stays"


def test_a_dry_run_deletes_and_writes_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Store(f"file://{store}").entries()
    assert run_command(store, "x\n", "--dry-run") == 0
    assert Store(f"file://{store}").entries() == before
    assert f"would delete file://{store}/{HERE}/expired" in capsys.readouterr().out


def test_the_hours_of_those_that_say_none(store: Path) -> None:
    assert run_command(store, "x\n", "--retain-hours", "10000") == 0
    assert left(store) == {"fresh", "unnamed", ADAPTER}, "what is older than that goes"


BAD: dict[str, tuple[str, str]] = {
    "nothing": ("\n", "--allow-empty"),
    "an error of kubectl": ("Error from server (Forbidden): x\n", "line 1 is not a uid"),
    "a table": ("a Running\nNAME PHASE AGE\n", "line 2 is not a uid"),
    "no uid": ("<none> Running\n", "line 1 is not a uid"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_list_of_runs_that_is_none_deletes_nothing(
    case: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = BAD[case]
    before = left(store)
    assert run_command(store, text) == 64
    assert words in capsys.readouterr().err
    assert left(store) == before


def test_no_run_at_all_if_that_is_said(store: Path) -> None:
    assert run_command(store, "", "--allow-empty") == 0
    assert left(store) == {"fresh", ADAPTER}
    with pytest.raises(BadSpecError):
        read_alive("")


@pytest.mark.parametrize(
    "arguments",
    [["sweep", "s3://b"], ["sweep", "s3://b", "--alive", "x", "--retain-hours", "0"], ["sweep", "--alive", "x"]],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_store_that_is_none_and_a_list_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "alive").write_text("a\n")
    assert main(["sweep", "ftp://b", "--alive", str(tmp_path / "alive")]) == 64
    assert main(["sweep", f"file://{tmp_path}", "--alive", str(tmp_path / "nowhere")]) == 64

"""The run document: one of a newer version is read as far as it is known, one of ours exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_api.run import RUN_VERSION
from lora_trainer.errors import BadSpecError
from lora_trainer.preflight import Findings, read_leniently
from lora_trainer.rundocument import parse_document, read_run

NEWER = RUN_VERSION + 1


def document(**changes: Any) -> dict[str, Any]:
    return {
        "namespace": "a",
        "name": "b",
        "uid": "c",
        "baseModel": {"uri": "file:///m"},
        "dataset": {"train": {"uri": "file:///d.jsonl"}},
        "training": {"maxSteps": 1},
        "publish": {"store": "file:///s"},
        **changes,
    }


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def test_a_newer_document_is_read_without_what_is_new(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file.write_text(json.dumps(document(version=NEWER, later=1, training={"maxSteps": 7, "fabric": "ib"})))
    run = read_run(run_file)
    assert (run.version, run.training.max_steps) == (NEWER, 7)
    assert run == read_run(run_file, say=False)
    said = capsys.readouterr().err
    assert said.count("later") == said.count("training.fabric") == 1, "once, although it is read twice"
    assert f"reads version {RUN_VERSION}" in said


def test_a_preflight_warns_of_what_it_left_out(run_file: Path) -> None:
    findings = Findings()
    run, broken = read_leniently(json.dumps(document(version=NEWER, later=1)), "run.json", findings)
    assert run is not None
    assert (broken, findings.problems) == (set(), [])
    assert findings.warnings[0].startswith("run.json: later: this trainer reads version")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": NEWER, "training": {"maxSteps": 1, "objective": "orpo"}, "later": 1}, "training.objective"),
        ({"version": NEWER, "publish": {}}, "publish.store"),
        ({"lora": {"rank": 8}}, "lora.rank"),
        ({"version": RUN_VERSION, "lora": {"rank": 8}}, "lora.rank"),
        ({"version": 1, "lora": {"rank": 8}}, "lora.rank"),
        ({"version": "9", "later": 8}, "version"),
        ({"version": True, "later": 8}, "version"),
    ],
)
def test_what_cannot_be_read_names_the_field(run_file: Path, changes: dict[str, Any], words: str) -> None:
    run_file.write_text(json.dumps(document(**changes)))
    with pytest.raises(BadSpecError, match=rf"run\.json: {words}: "):
        read_run(run_file)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '{"version": 9'])
def test_what_is_no_document_is_a_bad_spec(run_file: Path, text: str) -> None:
    run_file.write_text(text)
    with pytest.raises(BadSpecError):
        read_run(run_file)


@pytest.mark.parametrize("version", [1, RUN_VERSION])
def test_documents_up_to_our_own_version_are_read(version: int) -> None:
    assert parse_document(json.dumps(document(version=version))).left_out == ()

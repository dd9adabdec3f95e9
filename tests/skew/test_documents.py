"""The trainers of three releases and the run documents of three operators."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_api import LoRAFineTune, build_run_spec
from lora_api.runversions import to_version
from tests.skew.nextrelease import NEW_FIELD
from tests.skew.releases import RECORDED, Release
from tests.skew.story import STATES

Raw = dict[str, Any]
KEY = "0f" * 32
READ = """
import json, pathlib, sys
from lora_trainer.errors import TrainerError
from lora_trainer.launch import read_run
for name in sys.argv[1:]:
    try:
        run = read_run(pathlib.Path(name))
        print(json.dumps({"steps": run.training.max_steps, "uid": run.uid, "key": getattr(run, "control_key", None)}))
    except TrainerError as error:
        print(json.dumps({"class": str(error.failure_class), "message": str(error)}))
"""


def recorded(state: str) -> Raw:
    document: Raw = json.loads((RECORDED / f"{state}.json").read_text())
    return document


def run_of(state: str) -> LoRAFineTune:
    return LoRAFineTune.model_validate({name: recorded(state)["run"][name] for name in ("metadata", "spec", "status")})


def documents_of(state: str) -> dict[str, Raw]:
    """What each operator would hand to the trainer of a run in this state."""
    spec = build_run_spec(run_of(state), 2, KEY)
    whole = to_version(spec, 2).document
    found = {
        "today's, for the trainer of the release before": to_version(spec, 1).document,
        "today's": whole,
        "of the release after": {**whole, "version": 3, "training": {**whole["training"], NEW_FIELD: 60}},
    }
    maps = {item["metadata"]["name"]: item for item in recorded(state)["configmaps"]}
    return found | {"of the release before": json.loads(maps[f"{state}-1"]["data"]["run.json"])}


def read_by(release: Release, directory: Path, documents: dict[str, Raw]) -> tuple[dict[str, Raw], str]:
    """What the trainer of ``release`` makes of each document, and what it says."""
    files = []
    for number, document in enumerate(documents.values()):
        files.append(directory / f"{number}.json")
        files[-1].write_text(json.dumps(document))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, release.code))}
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, files)], capture_output=True, text=True, env=environment, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(documents, map(json.loads, done.stdout.splitlines()), strict=True)), done.stderr


@pytest.mark.parametrize("state", STATES)
def test_every_trainer_reads_the_documents_that_it_gets(
    before: Release, today: Release, after: Release, tmp_path: Path, state: str
) -> None:
    documents = documents_of(state)
    ours = {"steps": 18, "uid": recorded(state)["run"]["metadata"]["uid"]}
    for release in (today, after):
        found, said = read_by(release, tmp_path, documents)
        assert {name: one | {"key": None} for name, one in found.items()} == dict.fromkeys(found, ours | {"key": None})
        assert found["today's"]["key"] == found["of the release after"]["key"] == KEY
        assert (f"training.{NEW_FIELD}" in said) is (release is today), "what is left out is said"
    found, _ = read_by(before, tmp_path, documents)
    refused = {name for name, one in found.items() if "class" in one}
    assert refused == {"today's", "of the release after"}, "which is why a run keeps its trainer and its documents"
    assert {one["class"] for name, one in found.items() if name in refused} == {"BadSpec"}


def test_the_operator_makes_the_same_document_for_the_trainer_of_the_release_before() -> None:
    """But for the number of the attempt: pods of one run are not to train in two ways."""
    for state in ("running", "queued", "finished", "failed"):
        made = to_version(build_run_spec(run_of(state), 1), 1).document
        assert made == documents_of(state)["of the release before"]


def test_the_trainer_of_the_release_before_refuses_to_begin_at_step_0_what_is_to_go_on_from_elsewhere(
    before: Release, today: Release, tmp_path: Path
) -> None:
    run = run_of("running")
    checkpoint = run.spec.checkpoint.to_wire() | {"resumeFrom": {"name": "old"}}
    run = LoRAFineTune.model_validate(run.to_wire() | {"spec": run.spec.to_wire() | {"checkpoint": checkpoint}})
    documents = {"resumed": to_version(build_run_spec(run, 1), 1).document}
    found, _ = read_by(before, tmp_path, documents)
    assert found["resumed"]["class"] == "BadSpec"
    assert "checkpoint.resumeFrom" in found["resumed"]["message"]
    assert read_by(today, tmp_path, documents)[0]["resumed"]["steps"] == 18

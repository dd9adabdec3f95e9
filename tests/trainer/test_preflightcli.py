"""The command `preflight`: what it prints, its last words and its exit code; and what it asks of a hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_api.failures import RULES, FailureClass
from lora_api.messages import parse_termination
from lora_api.preflight import PreflightResult
from lora_api.run import RunSpec
from lora_trainer.cli import main
from tests.support.hub import run_hub
from tests.trainer.runs import SOURCES

Make = Callable[..., RunSpec]


def run_command(
    directory: Path, document: str, *arguments: str, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    (directory / "run.json").write_text(document)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, SOURCES)),
        "LORA_WORK": str(directory),
        "LORA_TERMINATION_LOG": str(directory / "words"),
        **(environment or {}),
    }
    command = [sys.executable, "-m", "lora_trainer", "preflight", str(directory / "run.json"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_command_pins_commits_on_a_hub_without_its_weights(
    make_run: Make, model: Path, data: Path, tmp_path: Path
) -> None:
    with run_hub() as hub:
        hub.add("models", "team/tiny", {"main": model}, {"hf_owner"})
        hub.add("datasets", "team/rows", {"main": data})
        commits = {kind: hub.repositories[kind, name].revisions["main"].commit for kind, name in hub.repositories}
        run = make_run(baseModel={"uri": "hf://team/tiny"}, dataset={"train": {"uri": "hf://team/rows"}, "eval": None})
        environment = {**hub.environment, "HF_TOKEN": "hf_owner"}
        done = run_command(tmp_path, json.dumps(run.to_wire()), environment=environment)
        asked = hub.fetched().count("model.safetensors")
    result = PreflightResult.model_validate_json(done.stdout)
    assert done.returncode == 0, done.stderr
    assert result.pins.base_model is not None
    assert result.pins.train is not None
    assert result.pins.base_model.revision == commits["models"]
    assert result.pins.train.revision == commits["datasets"]
    assert result.model is not None
    assert result.model.parameters == 106816
    assert asked == 1, "its header"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    words = parse_termination((tmp_path / "words").read_text())
    assert words is not None
    assert words.outcome == "succeeded"
    assert words.preflight is not None
    assert (words.preflight.pins, words.preflight.plan) == (result.pins, result.plan)
    assert "records" in words.message
    assert "steps" in words.message
    assert "preflight passed" in done.stderr


def test_the_command_ends_with_the_class_of_what_is_wrong(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_WORK", str(tmp_path))
    monkeypatch.setenv("LORA_TERMINATION_LOG", str(tmp_path / "words"))
    document = make_run().to_wire()
    document["training"]["maxSteps"] = 0
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert main(["preflight", str(tmp_path / "run.json")]) == RULES[FailureClass.BAD_SPEC].exit_code
    shown = capsys.readouterr()
    result = PreflightResult.model_validate_json(shown.out)
    assert [problem.failure_class for problem in result.problems] == [FailureClass.BAD_SPEC]
    assert "BadSpec: run.json: training.maxSteps: " in shown.err
    words = parse_termination((tmp_path / "words").read_text())
    assert words is not None
    assert (words.outcome, words.failure_class) == ("failed", FailureClass.BAD_SPEC)
    assert words.remedy == RULES[FailureClass.BAD_SPEC].remedy
    assert main(["preflight", str(tmp_path / "none.json")]) == RULES[FailureClass.BAD_SPEC].exit_code
    assert "No such file" in json.loads(capsys.readouterr().out)["problems"][0]["message"]
    for gib in ("0", "nan"):
        assert main(["preflight", str(tmp_path / "run.json"), f"--gpu-memory-gib={gib}"]) == 64
        assert "--gpu-memory-gib" in capsys.readouterr().err

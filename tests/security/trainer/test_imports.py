"""Code that somebody left where a run can write: nothing of the trainer finds it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_api.run import RunSpec
from lora_operator.children.pod import COMMAND
from tests.security import imports_probe
from tests.trainer.runs import SOURCES

Make = Callable[..., RunSpec]
FLAGS = COMMAND[1 : COMMAND.index("-m")]
"""How the pods' interpreter is started."""


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """The current directory of a pod, full of planted modules; so are its home, its hub cache and its /tmp."""
    scratch = tmp_path / "scratch"
    imports_probe.plant(tmp_path / "planted.log", [scratch, scratch / "tmp"])
    return scratch


def environment(scratch: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, SOURCES)),
        "HOME": str(scratch),
        "TMPDIR": str(scratch / "tmp"),
        "HF_HOME": str(scratch / "hf"),
        "HF_MODULES_CACHE": str(scratch / "hf" / "modules"),
        "LORA_WORK": str(scratch),
        "LORA_TERMINATION_LOG": str(scratch / "words"),
    }


def test_a_start_of_the_trainer_imports_nothing_from_elsewhere(scratch: Path) -> None:
    """Attack: A USER'S RUN leaves modules in scratch, $HOME, /tmp and the hub's cache for the trainer to import."""
    text = Path(imports_probe.__file__).read_text()
    log = str(scratch.parent / "planted.log")
    command = [sys.executable, *FLAGS, "-c", text, "check", log, *map(str, SOURCES)]
    done = subprocess.run(command, cwd=scratch, env=environment(scratch), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {kind: found for kind, found in json.loads(done.stdout).items() if found} == {}


def test_a_whole_run_beside_planted_modules_runs_none_of_them(make_run: Make, scratch: Path) -> None:
    """Attack: THE SAME, with the real launcher, its training processes and a tracker's client."""
    run = make_run(
        parallelism={"nodes": 2, "gpusPerNode": 0},
        training={"maxSteps": 2},
        tracking={"mlflow": {"experiment": "tests", "trackingUri": "http://127.0.0.1:9"}},
    )
    document = scratch.parent / "run.json"
    document.write_text(json.dumps(run.to_wire()))
    command = [sys.executable, *COMMAND[1:], "launch", str(document)]
    settings = environment(scratch) | {"LORA_TRACKING_SECONDS": "2"}
    done = subprocess.run(command, cwd=scratch, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    log = scratch.parent / "planted.log"
    assert not log.exists(), log.read_text()
    assert "tracking: MLflow: " in done.stdout, "its client was not there"


def test_the_probe_finds_what_is_planted(tmp_path: Path) -> None:
    """Without the flags, the current directory comes first."""
    imports_probe.plant(tmp_path / "planted.log", [tmp_path / "scratch"])
    text = Path(imports_probe.__file__).read_text()
    command = [sys.executable, "-c", text, "check", str(tmp_path / "planted.log"), *map(str, SOURCES)]
    env = environment(tmp_path / "scratch")
    done = subprocess.run(command, cwd=tmp_path / "scratch", env=env, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    kernels = str(tmp_path / "scratch" / "kernels.py")
    assert kernels in found["would be imported"]
    assert str(tmp_path / "scratch" / "torch.py") in found["modules"]
    assert str(tmp_path / "scratch" / "torch.py") in found["planted code that ran"]

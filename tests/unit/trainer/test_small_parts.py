"""Classification of errors, last words, out-of-memory counters, reports, and the demo's data."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from demo.tickets import make_tickets
from lora_api.failures import FAILURE_RULES, FailureClass
from lora_api.messages import parse_progress_line
from lora_trainer import settings
from lora_trainer.cli import build_parser
from lora_trainer.conclude import PodEnd, ProcessEnd, conclude
from lora_trainer.errors import DivergedError, StoppedError, StoreUnavailableError, classify, describe
from lora_trainer.oom import count_oom_kills
from lora_trainer.outcome import WorkerError, fallback_directory, read_errors, root_cause, write_error
from lora_trainer.progress import Progress
from lora_trainer.stop import StopRequest


class DistBackendError(RuntimeError):
    """Named as torch's."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class RepositoryNotFoundError(OSError):
    """Named as the hub's."""


ERRORS: list[tuple[BaseException, FailureClass]] = [
    (DivergedError("x"), FailureClass.DIVERGED),
    (OSError(errno.ENOSPC, "No space left on device"), FailureClass.DISK_FULL),
    (RuntimeError("[enforce fail] No space left on device"), FailureClass.DISK_FULL),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), FailureClass.GPU_OUT_OF_MEMORY),
    (RuntimeError("Connection closed by peer [127.0.0.1]:4711"), FailureClass.PEER_LOST),
    (RuntimeError("Timed out waiting 300000ms for send operation to complete"), FailureClass.PEER_LOST),
    (DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), FailureClass.PEER_LOST),
    (ConnectionResetError("Connection reset by peer"), FailureClass.PEER_LOST),
    (PermissionDeniedError("403"), FailureClass.AUTH_DENIED),
    (GenericError("timeout"), FailureClass.STORE_UNAVAILABLE),
    (RepositoryNotFoundError("404"), FailureClass.MODEL_NOT_FOUND),
    (ValueError("a fault of ours"), FailureClass.INTERNAL),
    (KeyError("q_proj"), FailureClass.INTERNAL),
]


@pytest.mark.parametrize(("error", "expected"), ERRORS, ids=lambda value: str(value)[:40])
def test_each_error_has_its_class(error: BaseException, expected: FailureClass) -> None:
    assert classify(error) == expected


def test_the_cause_counts_when_the_error_itself_says_nothing() -> None:
    error = RuntimeError("while saving")
    error.__cause__ = StoreUnavailableError("down")
    assert classify(error) == FailureClass.STORE_UNAVAILABLE
    assert describe(StoreUnavailableError("down")) == "down"
    assert describe(KeyError("x")) == "KeyError: 'x'"


def test_errors_survive_a_full_disk(tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file, where a directory should be")
    write_error(blocked, WorkerError(1, FailureClass.DISK_FULL, "full", 5.0))
    assert (fallback_directory(blocked) / "error-1.json").exists()
    (fallback_directory(blocked) / "error-1.json").unlink()
    fallback_directory(blocked).rmdir()


def test_the_root_cause_is_the_earliest_that_no_other_explains(tmp_path: Path) -> None:
    errors = [
        WorkerError(0, FailureClass.PEER_LOST, "closed", 1.0),
        WorkerError(1, FailureClass.GPU_OUT_OF_MEMORY, "later", 3.0, 4),
        WorkerError(2, FailureClass.INTERNAL, "first", 2.0, 4),
    ]
    for error in errors:
        write_error(tmp_path, error)
    assert read_errors(tmp_path) == errors
    assert root_cause(errors) == errors[2]
    assert root_cause([]) is None


def test_the_last_words_have_the_newest_checkpoint_that_any_process_knows_of(tmp_path: Path) -> None:
    for rank, step in enumerate((8, 12, None)):
        write_error(tmp_path, WorkerError(rank, FailureClass.INTERNAL, "it broke", 1.0 + rank, checkpoint_step=step))
    ends = {rank: ProcessEnd(70, 1.0 + rank) for rank in range(3)}
    pod = PodEnd(ends, processes=3, first_rank=0, gpus=False, stopped=False, killed_by_memory=False)
    assert conclude(pod, tmp_path)[1].checkpoint_step == 12


def test_last_words_without_a_checkpoint_say_nothing_of_one(tmp_path: Path) -> None:
    write_error(tmp_path, WorkerError(0, FailureClass.INTERNAL, "it broke", 1.0))
    ends = {0: ProcessEnd(70, 1.0)}
    pod = PodEnd(ends, processes=1, first_rank=0, gpus=False, stopped=False, killed_by_memory=False)
    assert "checkpointStep" not in conclude(pod, tmp_path)[1].to_wire()


def test_every_line_has_the_step_of_the_newest_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(enabled=True)
    progress.stage("training")
    progress.checkpoint_step = 4
    progress.report_step(step=5, total_steps=9)
    progress.stage("training")
    lines = [parse_progress_line(line) for line in capsys.readouterr().out.splitlines()]
    assert [line and line.checkpoint_step for line in lines] == [None, 4, 4]


def test_a_kernel_that_broke_off_may_be_the_echo_of_a_dead_gpu() -> None:
    """Of one that it read memory of; it may even have been seen first."""
    kernel = WorkerError(0, FailureClass.GPU_KERNEL_FAILED, "illegal memory access", 1.0)
    dead = WorkerError(3, FailureClass.GPU_FAULT, "uncorrectable NVLink error", 2.0)
    assert root_cause([kernel, dead]) == dead
    assert root_cause([kernel, WorkerError(1, FailureClass.INTERNAL, "later", 2.0)]) == kernel


CGROUPS = {
    "version 2, in a container": ("0::/\n", {"memory.events": "low 0\noom 4\noom_kill 3\n"}, 3),
    "version 2, below the root": (
        "0::/a/b\n",
        {"a/b/memory.events": "oom_kill 2\n", "memory.events": "oom_kill 9\n"},
        2,
    ),
    "version 1, in a container": (
        "5:cpu:/\n4:memory:/x\n",
        {"memory/memory.oom_control": "under_oom 0\noom_kill 7\n"},
        7,
    ),
    "none": ("", {}, 0),
    "a kernel without the counter": ("4:memory:/\n", {"memory/memory.oom_control": "under_oom 0\n"}, 0),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_out_of_memory_kills_are_counted(case: str, tmp_path: Path) -> None:
    own, files, expected = CGROUPS[case]
    (tmp_path / "cgroup").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert count_oom_kills(tmp_path / "fs", tmp_path / "cgroup") == expected
    assert count_oom_kills(tmp_path / "fs", tmp_path / "nowhere") == 0


def test_a_stop_inside_the_training_loop_is_only_noted_and_told_once() -> None:
    stop, told = StopRequest(), []
    stop.announce = lambda: told.append(stop.asked_at)
    with stop.deferred():
        stop.request("SIGTERM")
        stop.request("SIGTERM")
    assert stop.requested
    assert told == [stop.asked_at]
    with pytest.raises(StoppedError, match="checkpoint is complete"):
        stop.check()


def test_a_stop_outside_the_training_loop_ends_the_process_from_another_thread() -> None:
    """Also where the main thread is deep in a call that does not return."""
    program = (
        "import os, sys, threading\n"
        "from lora_trainer.stop import StopRequest\n"
        "stop = StopRequest()\n"
        "stop.install(lambda message: (print(message, flush=True), os._exit(75)))\n"
        "os.kill(os.getpid(), 15)\n"
        "threading.Lock().acquire() and threading.Event().wait(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, "asked to stop by SIGTERM" in ended.stdout) == (75, True), ended.stderr


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for rule in FAILURE_RULES:
        assert rule.exit_code is None or f"{rule.exit_code} {rule.failure_class.value}" in text


def test_the_tickets_are_always_the_same_and_all_different() -> None:
    tickets = make_tickets(500, seed=7)
    assert tickets == make_tickets(500, seed=7) != make_tickets(500, seed=8)
    assert len({ticket["prompt"] for ticket in tickets}) == 500
    for ticket in tickets:
        filed = json.loads(ticket["completion"])
        assert filed["customer"] in ticket["prompt"]
        assert str(filed["order"]) in ticket["prompt"]
        assert "\n" not in ticket["completion"]


def test_the_document_has_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    documented = dict(re.findall(r"^\| `(LORA_\w+)` \| `?([^|`]+?)`? \|", text, re.MULTILINE))
    lengths = {f"LORA_{name.upper()}": read for name, read in vars(settings).items() if name.endswith("_seconds")}
    assert documented.keys() == lengths.keys() | {"LORA_WORK", "LORA_TERMINATION_LOG"}
    for variable, read in lengths.items():
        monkeypatch.delenv(variable, raising=False)
        assert float(documented[variable]) == read(), variable
        monkeypatch.setenv(variable, "1.5")
        assert read() == 1.5, variable
    assert documented["LORA_WORK"] == str(settings.work_directory({}))
    assert documented["LORA_TERMINATION_LOG"] == str(settings.termination_log({}))

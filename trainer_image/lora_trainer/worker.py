"""One training process: runs ``train`` and leaves its outcome in a file for the launcher."""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_api.failures import RULES, FailureClass
from lora_trainer.errors import Finding, describe, find
from lora_trainer.outcome import WorkerError, write_error, write_result
from lora_trainer.progress import Progress
from lora_trainer.rundocument import read_run
from lora_trainer.seal import make_seal
from lora_trainer.settings import read_place, state_directory
from lora_trainer.stop import StopRequest
from lora_trainer.tracking import start_trackers

if TYPE_CHECKING:
    from lora_trainer import line as gang_line

PR_SET_PDEATHSIG = 1


class Ending:
    """How this process ends: one outcome, whichever thread has it first."""

    def __init__(self, rank: int, directory: Path, progress: Progress) -> None:
        self._rank, self._directory, self._progress = rank, directory, progress
        self._begun = threading.Lock()
        self.farewell: Callable[[], None] = lambda: None
        """Tells the other processes that this one leaves."""

    def begin(self) -> None:
        """Takes the last word. Who comes second waits here until the process is gone."""
        self._begun.acquire()

    def leave(self, message: str) -> None:
        """Ends the process, which was asked to stop. Called from another thread than the main one."""
        self.begin()
        self.farewell()
        self.record(Finding(FailureClass.CHECKPOINTED), message)
        end_process(exit_code(FailureClass.CHECKPOINTED))

    def record(self, found: Finding, message: str) -> None:
        """Leaves the reason for the launcher."""
        progress = self._progress
        error = WorkerError(
            self._rank, found.failure_class, message, time.time(), step=progress.step or None,
            micro_batch_size=progress.micro_batch_size, remedy=found.remedy, checkpoint_step=progress.checkpoint_step,
        )  # fmt: skip
        write_error(self._directory, error)


def run_worker(run_file: Path) -> int:
    """Trains the run in ``run_file``. Returns the exit code of the failure table; 0 is success."""
    end_with_parent()
    stop, place, directory = StopRequest(), read_place(), state_directory()
    progress = Progress(enabled=place.is_main)
    ending = Ending(place.rank, directory, progress)
    line: gang_line.Line | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stop.install(ending.leave)
        run = read_run(run_file, say=False)  # the launcher has said it
        progress.trackers = start_trackers(run, place, directory)
        quiet_libraries()
        from lora_trainer.line import Line
        from lora_trainer.train import train

        line = Line(place, stop, make_seal(run))
        ending.farewell = line.leave
        line.open()
        adapter = train(run, place, stop, progress, line)
        ending.begin()
        if adapter is not None:
            write_result(directory, adapter)
            with stop.deferred():
                progress.trackers.succeed(adapter)
    except BaseException as error:  # noqa: BLE001 - every end has a row in the failure table
        ending.begin()
        found, message = find(error), describe(error)
        kind = found.failure_class
        traceback.print_exc()
        ending.record(found, message)
        if line is not None and kind == FailureClass.PEER_LOST:
            ending.record(found, line.explain(message))
        elif line is not None and kind != FailureClass.CHECKPOINTED:
            line.announce_failure(kind)
        with stop.deferred():
            progress.trackers.fail(kind)
        return exit_code(kind)
    return 0


def exit_code(failure_class: FailureClass) -> int:
    """The trainer's exit code for a class; that of Internal for classes that only Kubernetes sees."""
    code = RULES[failure_class].exit_code
    return RULES[FailureClass.INTERNAL].exit_code or 1 if code is None else code


def end_process(code: int) -> None:
    """Ends the process at once: threads of a broken process group may keep a normal end from ever coming."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent() -> None:
    """Lets the kernel end this process when its launcher is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def quiet_libraries() -> None:
    """No progress bars in a pod's log, and not a line from LLM.int8() for each product that it casts to float16."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

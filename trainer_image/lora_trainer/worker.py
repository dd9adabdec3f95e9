"""One training process: runs ``train`` and leaves its outcome in a file for the launcher."""

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec
from lora_trainer.errors import classify, describe
from lora_trainer.outcome import WorkerError, write_error, write_result
from lora_trainer.progress import Progress
from lora_trainer.settings import read_place, state_directory
from lora_trainer.stop import StopRequest

PR_SET_PDEATHSIG = 1


def run_worker(run_file: Path) -> int:
    """Trains the run in ``run_file``. Returns the exit code of the failure table; 0 is success."""
    end_with_parent()
    stop, place = StopRequest(), read_place()
    progress = Progress(enabled=place.is_main)
    directory = state_directory()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        stop.install()
        run = RunSpec.model_validate_json(run_file.read_text(encoding="utf-8"))
        quiet_libraries()
        from lora_trainer.train import train

        adapter = train(run, place, stop, progress)
        if adapter is not None:
            write_result(directory, adapter)
    except BaseException as error:  # noqa: BLE001 - every end has a row in the failure table
        found = classify(error)
        traceback.print_exc()
        write_error(directory, WorkerError(place.rank, found, describe(error), time.time(), progress.step or None))
        return exit_code(found)
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

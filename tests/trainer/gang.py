"""Several training processes that run a list of cases and share one import of torch: a program of the tests.

Each process goes through the whole list and takes part in the cases that name it; cases of different processes run side
by side. What a case found out is written to DIRECTORY/NAME-RANK.json.

    python -m tests.trainer.gang CASES.json
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lora_trainer.launch import free_port
from tests.trainer.runs import ROOT, SOURCES


@dataclass(frozen=True)
class Case:
    """``work`` is a function of ``module``; ``processes`` take part, the first of them as rank 0.

    In gangs of one size a process must always have the same rank: DTensor remembers, by the mesh, which part is whose.
    """

    name: str
    work: str
    processes: list[int]
    arguments: dict[str, Any]
    port: int = 0
    module: str = "tests.trainer.gang_work"


def run_cases(cases: list[Case], directory: Path, timeout: float = 500) -> dict[str, list[dict[str, Any]]]:
    """What each case found out, by its name: one entry for each of its ranks."""
    directory.mkdir(parents=True, exist_ok=True)
    document = directory / "cases.json"
    listed = [asdict(case) | {"port": free_port()} for case in cases]
    document.write_text(json.dumps(listed))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*SOURCES, ROOT])), "OMP_NUM_THREADS": "1"}
    env["MALLOC_MMAP_THRESHOLD_"] = "16384"  # what is freed goes back to the kernel, so that memory can be measured
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    log = directory / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "tests.trainer.gang", str(document)]
        done = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, log.read_text()[-8000:]
    return {
        case.name: [
            json.loads((directory / f"{case.name}-{rank}.json").read_text()) for rank in range(len(case.processes))
        ]
        for case in cases
    }


@contextmanager
def place_of(rank: int, world_size: int, port: int) -> Iterator[None]:
    """The environment that the launcher gives to a training process, and no trace of it afterwards."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    own = {} if world_size == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(own)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name in own:
            del os.environ[name]


def main(document: Path) -> int:
    """Starts the processes, and ends all of them when one fails. Returns 0 if none did."""
    import torch

    from lora_trainer.worker import end_with_parent, quiet_libraries

    end_with_parent()
    quiet_libraries()
    torch.set_num_threads(1)
    cases = [Case(**entry) for entry in json.loads(document.read_text())]
    for module in {case.module for case in cases}:
        import_module(module)  # once, for all processes
    running: set[int] = set()
    for number in range(1 + max(max(case.processes) for case in cases)):
        process = os.fork()
        if process == 0:
            take_part(cases, number, document.parent)
        running.add(process)
    failed = False
    while running:
        process, status = os.wait()
        running.discard(process)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


def take_part(cases: list[Case], number: int, directory: Path) -> NoReturn:
    """One of the processes, which ends here."""
    from lora_trainer.worker import end_process, end_with_parent

    end_with_parent()
    try:
        for case in cases:
            if number not in case.processes:
                continue
            rank = case.processes.index(number)
            with place_of(rank, len(case.processes), case.port):
                found = getattr(import_module(case.module), case.work)(**case.arguments)
            (directory / f"{case.name}-{rank}.json").write_text(json.dumps(found))
    except BaseException:  # noqa: BLE001 - every end is told
        sys.stderr.write(f"process {number}, {case.name}:\n{traceback.format_exc()}")
        end_process(1)
    end_process(0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

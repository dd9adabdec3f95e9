"""(e) errors of CUDA and NCCL, provoked on the GPU: each has to end in the class that the trainer's table gives it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu.parts import Machine
from lora_api.failures import FailureClass
from lora_trainer.lastwords import find_last_words

LIMIT_SECONDS = 20.0
"""For all of them: they run at the same time, and most of it is the import of torch and the start of CUDA."""

REPORT = """
import os, sys
import torch
from lora_trainer.errors import find
def tell(error):
    print("class:", find(error).failure_class.value, flush=True)
    print(str(error).splitlines()[0], flush=True)
"""

GROUP = """
import torch.distributed as dist
def join(rank, world, file):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=world)
"""


@dataclass(frozen=True)
class Provocation:
    """A program that fails as no CPU can. ``aborts``: its watchdog ends it, and its last lines are looked at."""

    program: str
    want: FailureClass
    aborts: bool = False
    on_cpu: bool = False


PROVOCATIONS: dict[str, Provocation] = {
    "no GPU that is visible": Provocation(
        """
os.environ["CUDA_VISIBLE_DEVICES"] = ""
try:
    torch.cuda.init()
except RuntimeError as error:
    tell(error)
""", FailureClass.GPU_UNAVAILABLE, on_cpu=True),
    "a GPU that is not there": Provocation(
        """
try:
    torch.cuda.set_device(torch.cuda.device_count())
except RuntimeError as error:
    tell(error)
""", FailureClass.GPU_UNAVAILABLE),
    "more memory than there is": Provocation(
        """
try:
    torch.empty(1 << 44, dtype=torch.uint8, device="cuda")
except RuntimeError as error:
    tell(error)
""", FailureClass.GPU_OUT_OF_MEMORY),
    "a token id beyond the vocabulary": Provocation(
        """
try:
    torch.nn.Embedding(8, 8, device="cuda")(torch.tensor([9], device="cuda"))
    torch.cuda.synchronize()
except RuntimeError as error:
    tell(error)
""", FailureClass.BAD_DATA),
    "two processes of NCCL on one GPU": Provocation(
        GROUP + """
import tempfile
file = tempfile.mktemp()
child = os.fork()
try:
    join(0 if child else 1, 2, file)
    dist.all_reduce(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
except RuntimeError as error:
    if child:
        tell(error)
os._exit(0)
""", FailureClass.GPU_UNSUPPORTED),
    "the watchdog, after an error of its own GPU": Provocation(
        GROUP + """
import tempfile, time
join(0, 1, tempfile.mktemp())
rows, ids = torch.nn.Embedding(8, 8, device="cuda"), torch.tensor([9], device="cuda")
ones = torch.ones(1, device="cuda")
dist.all_reduce(ones)
torch.cuda._sleep(1 << 31)  # about a second, in which the next work is still under way
work = dist.all_reduce(ones, async_op=True)
rows(ids)
time.sleep(30)
""", FailureClass.BAD_DATA, aborts=True),
}  # fmt: skip


def errors(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """Each provocation in a process of its own."""
    chosen = {name: case for name, case in PROVOCATIONS.items() if machine.on_gpu or case.on_cpu}
    for name in PROVOCATIONS.keys() - chosen.keys():
        report(name, {"failed": "needs CUDA"})
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", REPORT + case.program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, case in chosen.items()
    }
    limit = machine.limit(LIMIT_SECONDS)
    for name, process in processes.items():
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        report(name, judge(chosen[name], output.splitlines(), process.returncode))


def judge(case: Provocation, lines: list[str], code: int) -> dict[str, Any]:
    """What came of a provocation, from what its process printed and its exit code."""
    told = [line.removeprefix("class: ") for line in lines if line.startswith("class: ")]
    words = lines[-1] if lines else ""
    if case.aborts:
        words, row = find_last_words(lines)
        told = [row.failure_class.value] if row is not None and code < 0 else []
    failed = {} if told == [case.want.value] else {"failed": f"{case.want.value} was expected"}
    return {"class": told[0] if told else None, "exitCode": code, "words": words[:300], **failed}

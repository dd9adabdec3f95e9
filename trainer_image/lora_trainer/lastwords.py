"""What a training process said last, and on which GPU: for those that end without leaving a reason."""

import re
from collections.abc import Iterable
from itertools import pairwise

from lora_api.failures import FailureClass
from lora_trainer.gpuerrors import GPU_ERRORS, GpuError, find_gpu_error

_OF_A_GPU = frozenset(
    {
        FailureClass.GPU_OUT_OF_MEMORY,
        FailureClass.GPU_FAULT,
        FailureClass.GPU_UNAVAILABLE,
        FailureClass.GPU_UNSUPPORTED,
        FailureClass.GPU_KERNEL_FAILED,
    }
)
_FATAL = re.compile(
    r"\s*(?:\[rank\d+\]:\s*)?(?:"
    r"terminate called|what\(\):|Fatal Python error|(?:[\w.]+(?:Error|Exception): )?CUDA error"
    r"|(?:\[Rank \d+\] )?Watchdog caught collective operation timeout"
    r"|\[[EF][^\]]*\.cpp:\d+\].*(?:[Ww]atchdog (?:thread terminated with|caught|got stuck)|CUDA error)"  # c10's log
    r"|(?:\[[^\]]*\] )?\S+:\d+:\d+ \[\d+\] .*NCCL WARN"  # host:process:thread [GPU]
    r"|Error .+ at line \d+ in file "  # bitsandbytes, which ends with exit code 1 then
    r")"
)
"""How the lines begin with which a library ends the process. No other is looked at: a log quotes records too, which may
well be about GPUs."""

_MOST = 1000
"""Characters of last words."""


def name_gpu(local_rank: int, visible: str | None) -> str:
    """``GPU 3 (GPU-8f2c...)``. ``visible`` is NVIDIA_VISIBLE_DEVICES, where the device plugin lists UUIDs."""
    listed = [name.strip() for name in (visible or "").split(",")]
    uuid = listed[local_rank] if local_rank < len(listed) else ""
    return f"GPU {local_rank} ({uuid})" if uuid.startswith(("GPU-", "MIG-")) else f"GPU {local_rank}"


def with_gpu(message: str, failure_class: FailureClass, local_rank: int, visible: str | None) -> str:
    """``message`` with the GPU in front, where the class speaks of one."""
    return f"{name_gpu(local_rank, visible)}: {message}" if failure_class in _OF_A_GPU else message


def find_last_words(lines: Iterable[str]) -> tuple[str, GpuError | None]:
    """The line with which a library ended the process whose last ``lines`` these are, and its row of the table.

    Of several the one whose row stands first: the watchdog's own GPU goes before its peers. Empty, if there is none.
    """
    telling = [
        line.strip() for before, line in pairwise(["", *lines]) if _FATAL.match(line) or before.strip() == "Last error:"
    ]
    rows = [(GPU_ERRORS.index(row), line) for line in telling if (row := find_gpu_error(line)) is not None]
    if rows:
        place, line = min(rows, key=lambda found: found[0])
        return line[:_MOST], GPU_ERRORS[place]
    return (telling[0][:_MOST], None) if telling else ("", None)

"""What GPUs say: each text is that of an installed library, and finds its own row."""

import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from lora_api.failures import RULES, FailureClass
from lora_trainer.errors import StoreUnavailableError, find
from lora_trainer.gpuerrors import CUDART, GPU_ERRORS, Blame, GpuError, find_gpu_error
from lora_trainer.lastwords import find_last_words, name_gpu, with_gpu

SITE = Path(torch.__file__).parents[1]
GUIDE = Path(__file__).parents[3] / "docs" / "gpu-failures.md"
BEGIN = "<!-- gpu errors: written by UPDATE_GOLDEN=1 pytest tests/unit/trainer/test_gpuerrors.py -->\n"
END = "<!-- end of gpu errors -->"


def name(row: GpuError) -> str:
    return row.phrases[0][:50]


each_row = pytest.mark.parametrize("row", GPU_ERRORS, ids=name)


@each_row
def test_the_text_finds_its_own_row(row: GpuError) -> None:
    """No row before it fits. The type of the exception does not matter."""
    assert find_gpu_error(row.text) is row
    for kind in (RuntimeError, OSError, ImportError, ValueError):
        found = find(kind(row.text))
        assert (found.failure_class, found.remedy) == (row.failure_class, row.remedy)


@each_row
def test_the_phrase_is_in_the_library_as_it_is_installed(row: GpuError) -> None:
    assert all(phrase in row.text for phrase in row.phrases)
    if not row.library:
        assert row.source
        return
    with (SITE / row.library).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(row.phrases[0].encode()) >= 0, f"{row.library} no longer says so"


@pytest.mark.parametrize("row", [row for row in GPU_ERRORS if row.library == CUDART], ids=name)
def test_the_texts_of_cuda_are_those_of_its_runtime(row: GpuError) -> None:
    runtime = ctypes.CDLL(str(SITE / CUDART))
    runtime.cudaGetErrorString.restype = runtime.cudaGetErrorName.restype = ctypes.c_char_p
    told = re.search(r"(cudaError\w+) \((\d+)\)", row.source)
    if told is None:  # what the driver's API says in the same words
        assert "driver_api" in row.source or "NCCL" in row.source
        return
    code = int(told[2])
    assert runtime.cudaGetErrorName(code).decode() == told[1]
    assert runtime.cudaGetErrorString(code).decode().rstrip(".") == row.phrases[0]


@each_row
def test_a_row_is_written_for_people(row: GpuError) -> None:
    assert (row.blame is Blame.PEER) == (row.failure_class is FailureClass.PEER_LOST)
    remedy = row.remedy or RULES[row.failure_class].remedy
    assert remedy.endswith(".")
    assert remedy[0].isupper()
    assert len(remedy) <= 400


def test_every_class_of_gpus_has_rows() -> None:
    assert len(GPU_ERRORS) >= 25
    assert len({row.text for row in GPU_ERRORS}) == len(GPU_ERRORS)
    ours = {kind for kind, rule in RULES.items() if rule.exit_code in range(80, 85)}
    assert ours <= {row.failure_class for row in GPU_ERRORS}


def test_only_what_another_node_can_change_is_retried() -> None:
    for kind in ("GPUFault", "GPUUnavailable"):
        assert RULES[FailureClass(kind)].retried
        assert RULES[FailureClass(kind)].node
    for kind in ("GPUUnsupported", "LimitTooLow"):
        assert not RULES[FailureClass(kind)].retried
        assert RULES[FailureClass(kind)].elsewhere, "once, on other nodes"
    assert not RULES[FailureClass.GPU_FAULT].charged, "as for a lost node"
    named = {kind for kind, rule in RULES.items() if rule.node}
    assert named == {"GPUFault", "GPUUnavailable", "GPUUnsupported", "LimitTooLow", "NodeLost", "DiskFull"}
    # All ranks end alike, so the pod that is looked at need not be on the node whose part changed.
    assert not RULES[FailureClass.WEIGHTS_CHANGED].node


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def line(row: GpuError) -> str:
    phrases = " ... ".join(f"`{phrase.strip()}`" for phrase in row.phrases)
    remedy = row.remedy or RULES[row.failure_class].remedy
    return f"| {phrases} | `{row.failure_class}` | {row.blame} | {cell(remedy)} | {cell(row.source)} |\n"


def test_the_guide_has_the_table() -> None:
    head, rest = GUIDE.read_text().split(BEGIN)
    table = "| it says | class | whose | what to do | where it is from |\n| --- | --- | --- | --- | --- |\n"
    want = head + BEGIN + table + "".join(map(line, GPU_ERRORS)) + END + rest.split(END)[1]
    if os.environ.get("UPDATE_GOLDEN"):
        GUIDE.write_text(want)
    assert GUIDE.read_text() == want


# -- last lines

WATCHDOG = "[rank1]:[E1129 22:00:00.123456789 ProcessGroupNCCL.cpp:2093] [PG ID 0 PG GUID 0(default_pg) Rank 1] "
ENDED = WATCHDOG + "Process group watchdog thread terminated with exception: "
TIMEOUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6463, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=600000) ran for 600017 milliseconds before timing out."
)
FRAME = "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7fbeb989ef86 in libc10.so)"
RECORD = 'sample: {"prompt": "Why does torch say uncorrectable ECC error encountered?"}'

LAST_LINES: dict[str, tuple[list[str], FailureClass | None, str]] = {
    "nothing": ([], None, ""),
    "nothing that ends a process": ([RECORD, "loading", FRAME], None, ""),
    "the watchdog, of its own GPU": (
        [ENDED + "CUDA error: uncorrectable ECC error encountered", FRAME, "terminate called", "  what():  CUDA error"],
        FailureClass.GPU_FAULT, ENDED + "CUDA error: uncorrectable ECC error encountered"),
    "the watchdog, of a silent peer": ([ENDED + TIMEOUT, FRAME], FailureClass.PEER_LOST, ENDED + TIMEOUT),
    "both: the process's own GPU comes first": (
        [ENDED + TIMEOUT, ENDED + "CUDA error: unspecified launch failure"], FailureClass.GPU_KERNEL_FAILED,
        ENDED + "CUDA error: unspecified launch failure"),
    "NCCL's last error, on a line of its own": (
        ["Last error:", "Failed to CUDA calloc async 608 bytes"],
        FailureClass.GPU_OUT_OF_MEMORY, "Failed to CUDA calloc async 608 bytes"),
    "a record that quotes a whole error": (
        ['sample: {"prompt": "RuntimeError: CUDA error: unspecified launch failure"}',
         "What does NCCL WARN Cuda failure 2 'out of memory' mean?", "user: terminate called: CUDA error",
         "Answer: see [E1129 ProcessGroupNCCL.cpp:2093] CUDA error: uncorrectable ECC error encountered"], None, ""),
    "a traceback of a thread": (
        ["Traceback:", "[rank0]: torch.AcceleratorError: CUDA error: unspecified launch failure"],
        FailureClass.GPU_KERNEL_FAILED, "[rank0]: torch.AcceleratorError: CUDA error: unspecified launch failure"),
    "NCCL's own log": (
        ["node-3:71:1254 [0] include/alloc.h:440 NCCL WARN Failed to CUDA calloc async 608 bytes"],
        FailureClass.GPU_OUT_OF_MEMORY,
        "node-3:71:1254 [0] include/alloc.h:440 NCCL WARN Failed to CUDA calloc async 608 bytes"),
    "bitsandbytes, which ends the process itself": (
        ["Error an illegal memory access was encountered at line 90 in file /src/csrc/ops.cu"],
        FailureClass.GPU_KERNEL_FAILED,
        "Error an illegal memory access was encountered at line 90 in file /src/csrc/ops.cu"),
    "a record that quotes an error, before an end in other words": (
        [RECORD, "terminate called after throwing an instance of 'std::bad_alloc'"], None,
        "terminate called after throwing an instance of 'std::bad_alloc'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAST_LINES)
def test_what_a_process_said_last(case: str) -> None:
    lines, kind, want = LAST_LINES[case]
    said, row = find_last_words(lines)
    assert (said, row and row.failure_class) == (want, kind)


def test_what_is_told_of_a_gpu_names_it() -> None:
    listed = "GPU-aa, GPU-bb"
    assert name_gpu(1, listed) == "GPU 1 (GPU-bb)"
    assert name_gpu(2, listed) == "GPU 2"
    assert [name_gpu(0, visible) for visible in (None, "", "all", "void")] == ["GPU 0"] * 4
    assert with_gpu("lost", FailureClass.GPU_FAULT, 0, listed) == "GPU 0 (GPU-aa): lost"
    assert with_gpu("closed", FailureClass.PEER_LOST, 0, listed) == "closed"


def test_what_is_ours_is_not_looked_up() -> None:
    """The store's answer may quote anything."""
    found = find(StoreUnavailableError("no success within 60 s: Connection closed by peer 10.0.0.7"))
    assert found.failure_class is FailureClass.STORE_UNAVAILABLE
    assert find(KeyError("CUDA error: out of memory")).failure_class is FailureClass.INTERNAL

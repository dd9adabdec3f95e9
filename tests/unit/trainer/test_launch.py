"""The launcher, with small programs in place of the training processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import lora_trainer.conclude
import lora_trainer.launch
from lora_api.failures import RULES, FailureClass
from lora_api.messages import Termination, parse_termination
from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.launch import launch, read_topology, worker_command, worker_environment

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank, state = int(os.environ.get("RANK", "0")), Path(os.environ["LORA_STATE_DIR"])
def fail(kind, message, at, code):
    error = {"rank": rank, "failure_class": kind, "message": message, "at": at, "step": 3}
    (state / f"error-{rank}.json").write_text(json.dumps(error))
    sys.exit(code)
"""


def document(nodes: int = 2, gpus: int = 0, store: Path = Path("/dev/null")) -> dict[str, Any]:
    return {
        "namespace": "a",
        "name": "b",
        "uid": "c",
        "baseModel": {"uri": "file:///m"},
        "dataset": {"train": {"uri": "file:///d.jsonl"}},
        "training": {"maxSteps": 1, "globalBatchSize": nodes * max(1, gpus)},
        "parallelism": {"nodes": nodes, "gpusPerNode": gpus},
        "publish": {"store": f"file://{store}"},
    }


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, Termination]]]:
    """Runs the launcher here, with ``program`` as each training process. Returns exit code and last words."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setenv("LORA_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("LORA_TERMINATION_LOG", str(tmp_path / "words"))
    monkeypatch.setenv("LORA_PEER_GRACE_SECONDS", "0.3")
    monkeypatch.setenv("LORA_STOP_GRACE_SECONDS", "0.5")
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(program: str, nodes: int = 2, gpus: int = 0) -> tuple[int, Termination]:
        script = tmp_path / "worker.py"
        script.write_text(PRELUDE + textwrap.dedent(program))
        monkeypatch.setattr(lora_trainer.launch, "worker_command", lambda _: [sys.executable, str(script)])
        told = document(nodes, gpus, tmp_path / "store")
        (tmp_path / "run.json").write_text(json.dumps(told))
        code = launch(tmp_path / "run.json")
        words = parse_termination((tmp_path / "words").read_text())
        assert words is not None
        assert list((tmp_path / "work").iterdir()) == [], "the state directory is left"
        return code, words

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


ENDS: dict[str, tuple[str, int, FailureClass | None, str, int | None]] = {
    "all succeed": ("pass", 0, None, "", None),
    "both find the same bad record": (
        'fail("BadData", f"record 7 by {rank}", 100 + rank, 65)', 65, FailureClass.BAD_DATA, "record 7 by 0", 0),
    "a lost connection is not the cause, even if it is seen first": (
        """
        if rank == 0:
            fail("PeerLost", "connection closed", 100, 73)
        fail("BadSpec", "no such module", 200, 64)
        """, 64, FailureClass.BAD_SPEC, "no such module", 1),
    "only lost connections": (
        'fail("PeerLost", "connection closed", 100 + rank, 73)', 73, FailureClass.PEER_LOST, "connection closed", 0),
    "one was asked to stop, and its peer has not heard of it yet": (
        """
        if rank == 1:
            fail("Checkpointed", "step 3", 100, 75)
        time.sleep(600)
        """, 75, FailureClass.CHECKPOINTED, "step 3", 1),
    "one fails, its peer hangs and ignores everything": (
        """
        if rank == 1:
            fail("Diverged", "norm is nan", 100, 72)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
        """, 72, FailureClass.DIVERGED, "norm is nan", 1),
    "one is killed and its peer says that it lost it": (
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fail("PeerLost", "connection closed", 100, 73)
        """, 70, FailureClass.INTERNAL, "SIGKILL", 1),
    "one crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", 70, FailureClass.INTERNAL, "SIGSEGV", None),
    "one ends without a word": ("sys.exit(1)", 70, FailureClass.INTERNAL, "exit code 1", None),
    "one ends without a word, with a code of the table": (
        "sys.exit(71)", 71, FailureClass.GPU_OUT_OF_MEMORY, "71", None),
    "an error file that was cut while it was written": (
        '(state / f"error-{rank}.json").write_text("{"); sys.exit(65)', 65, FailureClass.BAD_DATA, "65", None),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_how_a_pod_ends(case: str, pod: Callable[..., tuple[int, Termination]]) -> None:
    program, code, expected, message, rank = ENDS[case]
    found, words = pod(program)
    assert (found, words.failure_class) == (code, expected)
    assert message in words.message
    assert words.outcome == ("succeeded" if expected is None else "failed")
    assert words.remedy == (RULES[expected].remedy if expected else None)
    if rank is not None:
        assert words.rank == rank


def test_a_published_adapter_is_in_the_last_words(pod: Callable[..., tuple[int, Termination]]) -> None:
    adapter = {
        "uri": "s3://b/x", "digest": "sha256:" + "0" * 64, "version": 3, "servedName": "b-v3", "rank": 8,
        "servingMaxLoraRank": 8, "sizeBytes": 12, "evalLossBefore": 2.0, "evalLossAfter": 1.0,
    }  # fmt: skip
    code, words = pod(f"if rank == 0: (state / 'result.json').write_text({json.dumps(adapter)!r})")
    assert code == 0
    assert words.adapter is not None
    assert words.adapter.to_wire() == adapter


def test_a_process_that_the_kernel_killed_for_memory(
    pod: Callable[..., tuple[int, Termination]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([2, 3])
    monkeypatch.setattr(lora_trainer.launch, "count_oom_kills", lambda: next(counts))
    code, words = pod("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nfail('PeerLost', 'closed', 100, 73)")
    assert (code, words.failure_class, words.rank) == (137, FailureClass.HOST_OUT_OF_MEMORY, 1)
    assert words.remedy is not None
    assert "limits.memory" in words.remedy


def stop_when(path: Path) -> threading.Thread:
    """Sends this process SIGTERM once ``path`` is there."""

    def watch() -> None:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # between looks at a condition
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_sigterm_is_passed_on(pod: Callable[..., tuple[int, Termination]], tmp_path: Path) -> None:
    thread = stop_when(tmp_path / "ready")
    code, words = pod(
        f"""
        signal.signal(signal.SIGTERM, lambda *_: fail("Checkpointed", "step 3 is complete", time.time(), 75))
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(600)
        """,
        nodes=1,
    )
    thread.join()
    assert (code, words.failure_class, words.step) == (75, FailureClass.CHECKPOINTED, 3)


def test_a_process_that_does_not_stop_in_time_is_killed(
    pod: Callable[..., tuple[int, Termination]], tmp_path: Path
) -> None:
    thread = stop_when(tmp_path / "ready")
    code, words = pod(
        f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(600)
        """,
        nodes=1,
    )
    thread.join()
    assert (code, words.failure_class) == (143, FailureClass.POD_LOST)
    assert "no checkpoint was complete" in words.message


def test_orphans_are_reaped_and_do_not_count(pod: Callable[..., tuple[int, Termination]]) -> None:
    code, _ = pod("if os.fork() == 0: os._exit(9)\nos.wait()", nodes=1)
    assert code == 0


BAD_DOCUMENTS = {
    "not JSON": ("{", "Invalid JSON"),
    "a field that is missing": ("{}", "Field required"),
    "a value out of bounds": (json.dumps(document() | {"lora": {"r": 0}}), "lora.r"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_a_bad_run_document(case: str, tmp_path: Path, pod: object, monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = BAD_DOCUMENTS[case]
    (tmp_path / "run.json").write_text(text)
    assert launch(tmp_path / "run.json") == 64
    assert words in (tmp_path / "words").read_text()
    assert launch(tmp_path / "nowhere.json") == 64


def test_a_full_scratch_disk(pod: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lora_trainer.launch, "make_state_directory", full)
    (tmp_path / "run.json").write_text(json.dumps(document(store=tmp_path / "store")))
    assert launch(tmp_path / "run.json") == 77


def test_a_name_that_never_resolves(pod: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("LORA_RENDEZVOUS_SECONDS", "0")
    (tmp_path / "run.json").write_text(json.dumps(document(store=tmp_path / "store")))
    assert launch(tmp_path / "run.json") == 73
    assert "nowhere.invalid" in (tmp_path / "words").read_text()


EXPIRIES: dict[str, tuple[str, str, list[str]]] = {
    "it failed": ('fail("GPUFault", "Xid 48", 100, 71)', "0", ["GPUFault"]),
    "it failed without a word": ("os.kill(os.getpid(), signal.SIGSEGV)", "0", ["Internal"]),
    "it was asked to stop": ('fail("Checkpointed", "asked to stop", 100, 75)', "0", ["Checkpointed"]),
    "it succeeded": ("pass", "0", []),
    "it failed in another pod than that of rank 0": ('fail("GPUFault", "Xid 48", 100, 71)', "1", []),
}


@pytest.mark.parametrize("case", EXPIRIES)
def test_an_attempt_without_success_says_until_when_its_checkpoints_are_kept(
    case: str, pod: Callable[..., tuple[int, Termination]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, node, why = EXPIRIES[case]
    for name, value in {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": node, "MASTER_ADDR": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    directory = tmp_path / "store/a/b/checkpoints/c"
    for step in ("step-2", "step-4"):
        (directory / step).mkdir(parents=True)
    (directory / "step-2/COMPLETE.json").write_text("{}")
    before = time.time()
    pod(program)
    found = {file.parent.name: json.loads(file.read_text()) for file in directory.glob("*/EXPIRES.json")}
    assert list(found) == ["step-2"] * len(why), "a checkpoint that is not complete needs none"
    assert [one["why"] for one in found.values()] == why
    for one in found.values():
        assert (one["run"], one["retainHours"]) == ("b", 168)
        left = datetime.fromisoformat(one["expiresAt"]).timestamp() - before
        assert left == pytest.approx(168 * 3600, abs=60)


def test_a_store_that_is_away_keeps_no_pod_from_its_end(
    pod: Callable[..., tuple[int, Termination]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").write_text("no directory")
    code, words = pod('fail("BadData", "record 7", 100, 65)')
    assert (code, words.failure_class) == (65, FailureClass.BAD_DATA)
    assert "until when its checkpoints are kept could not be written" in capfd.readouterr().err


def test_the_gang_as_the_pod_says_it() -> None:
    run = RunSpec.model_validate(document(nodes=2))
    env = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "x-0.x", "PET_NPROC_PER_NODE": "1"}
    topology = read_topology(run, env)
    assert (topology.nodes, topology.processes, topology.node_rank) == (2, 1, 1)
    assert (topology.master_address, topology.master_port) == ("x-0.x", 29500)
    own = worker_environment(run, topology, 0, Path("/state"))
    assert (own["RANK"], own["LOCAL_RANK"], own["WORLD_SIZE"], own["MASTER_ADDR"]) == ("1", "0", "2", "x-0.x")
    with pytest.raises(BadSpecError, match="asks for 2 processes"):
        read_topology(run, env | {"PET_NNODES": "3"})


def test_code_is_loaded_from_what_this_start_compiled_whatever_the_pod_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "HF_MODULES_CACHE", "CUDA_CACHE_PATH",
    )  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "/mnt/pvc/models/cache")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    run = RunSpec.model_validate(document(nodes=1))
    own = worker_environment(run, read_topology(run, {}), 0, Path("/state"))
    assert [Path(own[name]).parent for name in names] == [Path("/state/code")] * len(names)
    assert (own["PYTHONSAFEPATH"], own["PYTHONNOUSERSITE"]) == ("1", "1")
    assert worker_command(Path("/run.json"))[1:3] == ["-P", "-s"]


def test_one_process_alone_does_not_look_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunSpec.model_validate(document(nodes=1))
    own = worker_environment(run, read_topology(run, {}), 0, Path("/state"))
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(own)
    assert own["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub = RunSpec.model_validate(document(nodes=1) | {"baseModel": {"uri": "hf://a/b"}})
    assert worker_environment(hub, read_topology(hub, {}), 0, Path("/state"))["HF_HUB_OFFLINE"] == "0"


def test_the_launcher_imports_no_torch() -> None:
    code = "import lora_trainer.launch, lora_trainer.cli, sys; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["crds", "trainer_image"])}
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, check=False).returncode == 0


# -- processes that a library or the kernel ends, on GPUs

ABORTS = """
WATCHDOG = f"[rank{rank}]:[E1129 ProcessGroupNCCL.cpp:2093] [PG ID 0 PG GUID 0 Rank {rank}] "
ENDED = WATCHDOG + "Process group watchdog thread terminated with exception: "
def abort(*lines):
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    os.abort()
def own_gpu(what):
    abort(ENDED + f"CUDA error: {what}", *["frame #1: c10::cuda::c10_cuda_check_implementation"] * 60,
          "terminate called after throwing an instance of 'c10::DistBackendError'",
          f"  what():  {ENDED}CUDA error: {what}")
def silent_peer():
    abort(ENDED + f"[Rank {rank}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6463)")
"""

DEATHS: dict[str, tuple[str, int, FailureClass, tuple[str, ...], int | None]] = {
    "a GPU that dies, and a peer that waits for it": (
        """
        if rank == 1:
            time.sleep(0.1)
            own_gpu("uncorrectable ECC error encountered")
        silent_peer()
        """, 80, FailureClass.GPU_FAULT, ("GPU 1 (GPU-bb): ", "SIGABRT", "uncorrectable ECC error encountered"), 1),
    "a GPU that dies, and a peer that raises what NCCL says of it": (
        """
        if rank == 1:
            own_gpu("unknown error")
        fail("PeerLost", "NCCL error: remote process exited or there was a network error", 100, 73)
        """, 80, FailureClass.GPU_FAULT, ("GPU 1 (GPU-bb): ", "unknown error"), 1),
    "a kernel that breaks off": (
        "own_gpu('an illegal memory access was encountered') if rank == 0 else silent_peer()", 83,
        FailureClass.GPU_KERNEL_FAILED, ("GPU 0 (GPU-aa): ", "illegal memory access"), 0),
    "the GPU's own error was raised first, and the watchdog aborts while the process leaves": (
        """
        if rank == 0:
            error = {"rank": 0, "failure_class": "GPUFault", "message": "CUDA error: uncorrectable ECC error",
                     "at": 100, "step": 3, "remedy": "Replace it."}
            (state / "error-0.json").write_text(json.dumps(error))
            own_gpu("uncorrectable ECC error encountered")
        silent_peer()
        """, 80, FailureClass.GPU_FAULT, ("GPU 0 (GPU-aa): CUDA error: uncorrectable",), 0),
    "only silent peers": ("silent_peer()", 73, FailureClass.PEER_LOST, ("SIGABRT", "SeqNum=6463"), None),
    "an abort without a word is nobody else's": ("os.abort()", 70, FailureClass.INTERNAL, ("SIGABRT",), None),
    "an abort of another library keeps its words": (
        "abort('terminate called after throwing an instance of std::bad_alloc')", 70, FailureClass.INTERNAL,
        ("SIGABRT", "std::bad_alloc"), None),
    "a segmentation fault after CUDA said why": (
        """
        print("CUDA error: unspecified launch failure", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
        """, 83, FailureClass.GPU_KERNEL_FAILED, ("SIGSEGV", "unspecified launch failure"), None),
    "a last line that has no end": (
        "sys.stderr.write('CUDA error: misaligned address'); sys.stderr.flush(); os.abort()", 83,
        FailureClass.GPU_KERNEL_FAILED, ("SIGABRT", "misaligned address"), None),
    "a record that quotes CUDA is no word of it": (
        """
        print("sample: what is an uncorrectable ECC error encountered by a GPU?", flush=True)
        os.abort()
        """, 70, FailureClass.INTERNAL, ("SIGABRT",), None),
    "who is killed from outside is not asked": (
        """
        if rank == 1:
            print("CUDA error: unspecified launch failure", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        silent_peer()
        """, 70, FailureClass.INTERNAL, ("SIGKILL",), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", DEATHS)
def test_whose_fault_a_death_is(
    case: str, pod: Callable[..., tuple[int, Termination]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's watchdog aborts on a silent peer and on the GPU's own errors alike."""
    program, code, expected, words, rank = DEATHS[case]
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    monkeypatch.setenv("LORA_PEER_GRACE_SECONDS", "20")  # all end by themselves, on a busy machine one much later
    found, said = pod(ABORTS + textwrap.dedent(program), nodes=1, gpus=2)
    assert (found, said.failure_class) == (code, expected), said
    for part in words:
        assert part in said.message
    if rank is not None:
        assert said.rank == rank


@pytest.fixture
def small_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of memory of 1 MiB, in place of /dev/shm."""
    place = tmp_path / "shm"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    monkeypatch.setattr(lora_trainer.conclude, "SHARED_MEMORY", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


MAPS = """
import mmap
with open({path!r}, "w+b") as file:
    file.truncate(4 << 20)
    pages = mmap.mmap(file.fileno(), 4 << 20)
    {then}
    for place in range(0, 4 << 20, 4096):
        pages[place] = 1
"""


def test_a_bus_error_where_shared_memory_is_full(pod: Callable[..., tuple[int, Termination]], small_shm: Path) -> None:
    """A real one: writing to a mapped file that has no room."""
    code, words = pod(MAPS.format(path=str(small_shm / "segment"), then=""), nodes=1)
    assert (code, words.failure_class) == (84, FailureClass.LIMIT_TOO_LOW)
    assert "SIGBUS" in words.message
    assert "/dev/shm of 1 MiB is full" in words.message
    assert "limits.memory" in (words.remedy or "")


def test_a_bus_error_elsewhere(pod: Callable[..., tuple[int, Termination]], small_shm: Path, tmp_path: Path) -> None:
    """A real one: the file was cut while it was mapped."""
    code, words = pod(MAPS.format(path=str(tmp_path / "weights"), then="file.truncate(0)"), nodes=1)
    assert (code, words.failure_class) == (70, FailureClass.INTERNAL)
    assert "none of /dev/shm, which has 1 of 1 MiB free" in words.message

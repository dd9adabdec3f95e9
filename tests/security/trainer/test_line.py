"""What a process that reaches a gang's TCPStore, and has not the run's key, can make the gang do."""

import secrets
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_trainer.launch import free_port
from lora_trainer.line import ANY_RANK
from lora_trainer.seal import Seal
from tests.trainer.runs import Launched, merge

Make = Callable[..., RunSpec]
Launch = Callable[..., Launched]
KEY = secrets.token_hex(32)
MIB = 2**20
IGNORED = "a message that asks this gang to stop is ignored"


def make_gang_run(make_run: Make, **changes: Any) -> RunSpec:
    base = {"controlKey": KEY, "parallelism": {"nodes": 2, "gpusPerNode": 0}, "training": {"maxSteps": 80}}
    return make_run(**merge(base, changes))


def start_gang(fork: Launch, run: RunSpec) -> tuple[list[Launched], int]:
    """Two pods of one process each, and the port of rank 0."""
    port = free_port()
    gang = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(port)}
    return [fork(run, PET_NODE_RANK=str(rank), **gang) for rank in range(2)], port


def connect(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)


def resident(pid: int) -> int:
    """Memory of a process in bytes, without pages of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def values(store: dist.TCPStore, names: list[str]) -> list[bytes]:
    """What the store holds under ``names``. The gang deletes its old messages: those of them are left out."""
    store.set_timeout(timedelta(seconds=1))
    found = []
    for name in names:
        try:
            found.append(store.get(name))
        except dist.DistStoreError:  # the server waits for a key that is not there
            assert not store.check([name]), name
    assert len(found) > len(names) / 2, names
    return found


def forge(store: dist.TCPStore, run: RunSpec) -> None:
    """Asks the gang to stop in every way that is open to one without its key, and floods it."""
    store.set("stop", "1")
    store.append("stop", ", which failed (BadData)")
    others = (
        Seal(run.uid, run.attempt),
        Seal(run.uid, run.attempt, secrets.token_bytes(32)),
        Seal(run.uid, run.attempt + 1, bytes.fromhex(KEY)),
        Seal("another uid", run.attempt, bytes.fromhex(KEY)),
    )
    for seal in others:
        store.set(seal.name("asked", 1, FailureClass.BAD_DATA.value), "")
        store.set(seal.name("stop", ANY_RANK), "")
        store.set(seal.name("done", 0, "adapter in the store"), "")
    for word in ("lost/0", "lost/1", "left/0", "left/1", "said/0", "beat/1", "lora/adapter in the store"):
        store.set(word, "999999 1.0")
    for number in range(20_000):
        store.set(f"stop/{number}", "")
    for _ in range(32):  # torch's server takes no more than 8 MiB at once, but values grow
        store.append("stop", "x" * 4 * MIB)


def test_a_stranger_can_neither_stop_a_gang_nor_fill_its_ranks(make_run: Make, fork: Launch) -> None:
    """Attack: A POD THAT REACHES RANK 0'S PORT writes `stop`, a failure, long values and many keys into the store."""
    run = make_gang_run(make_run)
    pods, port = start_gang(fork, run)
    pods[0].wait_step(2)
    (reader,) = pods[1].workers
    before = resident(reader)
    store = connect(port)
    forge(store, run)
    pods[0].wait_text(IGNORED)
    assert resident(reader) - before < 64 * MIB
    listed = store.list_keys()
    assert KEY not in "".join(listed)
    small = [name for name in listed if name != "stop" and not name.startswith("stop/")]
    assert bytes.fromhex(KEY) not in b"".join(values(store, small))
    del store

    assert [pod.wait() for pod in pods] == [0, 0], pods[0].log.read_text()[-5000:]
    assert set(pods[0].losses) == set(range(1, 81))
    assert [pod.log.read_text().count(IGNORED) for pod in pods] == [1, 0]


def test_the_key_of_a_run_stops_it_and_is_published_nowhere(make_run: Make, fork: Launch, tmp_path: Path) -> None:
    """Attack: A READER OF THE STORE OR OF LOGS looks for a run's key in all that the run leaves.

    The run is stopped at one rank, which the other hears of; its checkpoint stays. The next attempt publishes.
    """
    run = make_gang_run(make_run, tracking={"tensorboard": True}, publish={"mergeBase": True})
    pods, _ = start_gang(fork, run)
    pods[0].wait_step(2)
    pods[1].process.send_signal(signal.SIGTERM)
    assert [pod.wait() for pod in pods] == [75, 75], pods[0].log.read_text()[-5000:]
    assert "asked to stop by rank 1; " in pods[0].log.read_text()
    stopped = read_all(tmp_path)
    assert any(path.name == "COMPLETE.json" for path in stopped)

    last, _ = start_gang(fork, run.model_copy(update={"attempt": 2}))
    assert [pod.wait() for pod in last] == [0, 0], last[0].log.read_text()[-5000:]
    left = read_all(tmp_path)
    assert {"README.md", "report.html", "manifest.json", "adapter_config.json", "log"} <= {path.name for path in left}
    for path, content in (*stopped.items(), *left.items()):
        assert KEY.encode() not in content, path
        assert bytes.fromhex(KEY) not in content, path


def read_all(directory: Path) -> dict[Path, bytes]:
    """All files of the gang and its store, without the run documents themselves."""
    found = [path for path in directory.rglob("*") if path.is_file() and path.name != "run.json"]
    return {path: path.read_bytes() for path in found}


def test_a_gang_without_a_key_says_once_that_it_hears_everybody(make_run: Make, fork: Launch) -> None:
    run = make_gang_run(make_run, controlKey=None, training={"maxSteps": 2})
    pods, _ = start_gang(fork, run)
    assert [pod.wait() for pod in pods] == [0, 0], pods[0].log.read_text()[-5000:]
    words = "the run document has no controlKey, so messages between the processes are not authenticated"
    assert [pod.log.read_text().count(words) for pod in pods] == [1, 0]

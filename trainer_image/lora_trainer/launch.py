"""The pods' first process: starts one training process per GPU, waits for them, and says how it ended.

Not torchrun: it ends with exit code 1 for every reason, hides which rank failed first, and restarts on stale state
(torch 2.13). Here the exit code is that of the failure table, the termination message has the root cause, and
no training process outlives the launcher. Imports no torch, so that it starts at once.
"""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from lora_api.failures import RULES, FailureClass
from lora_api.messages import Termination
from lora_api.run import MASTER_PORT, RunSpec
from lora_trainer.conclude import PodEnd, ProcessEnd, conclude, conclude_without
from lora_trainer.errors import BadSpecError, PeerLostError, StoppedError, TrainerError
from lora_trainer.expiry import MOST_SECONDS, leave_expiry
from lora_trainer.interpreter import CODE_CACHES, OWN_CODE_ONLY, python_command
from lora_trainer.oom import count_oom_kills
from lora_trainer.outcome import fallback_directory
from lora_trainer.relay import Relay
from lora_trainer.rundocument import read_run
from lora_trainer.settings import (
    STATE_DIRECTORY,
    peer_grace_seconds,
    rendezvous_seconds,
    stop_grace_seconds,
    termination_log,
    work_directory,
)

POLL_SECONDS = 0.05
STOPPED_EXIT = RULES[FailureClass.CHECKPOINTED].exit_code


@dataclass(frozen=True)
class Topology:
    """Where this pod is in the gang, and where rank 0 listens."""

    nodes: int
    processes: int
    node_rank: int
    master_address: str
    master_port: int
    gpus: bool = False

    @property
    def world_size(self) -> int:
        """Training processes over all pods."""
        return self.nodes * self.processes


def read_topology(run: RunSpec, env: Mapping[str, str] = os.environ) -> Topology:
    """The gang's shape from the pod's environment. Without one, all processes of the run are started here.

    Raises:
        BadSpecError: environment and run document do not fit.
    """
    alone = "PET_NNODES" not in env
    nodes = 1 if alone else int(env["PET_NNODES"])
    default = run.parallelism.world_size if alone else run.parallelism.processes_per_node
    processes = int(env.get("PET_NPROC_PER_NODE", default))
    topology = Topology(
        nodes,
        processes,
        int(env.get("PET_NODE_RANK", 0)),
        env.get("MASTER_ADDR", "127.0.0.1"),
        int(env.get("MASTER_PORT", free_port() if alone else MASTER_PORT)),
        gpus=run.parallelism.gpus_per_node > 0,
    )
    if topology.world_size != run.parallelism.world_size:
        raise BadSpecError(
            f"parallelism asks for {run.parallelism.world_size} processes, the pods are set up for {nodes} nodes with "
            f"{processes} each"
        )
    return topology


def worker_command(run_file: Path) -> list[str]:
    """Command line of one training process."""
    return python_command("lora_trainer", "train", str(run_file))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def worker_environment(run: RunSpec, topology: Topology, local_rank: int, state: Path) -> dict[str, str]:
    """Environment of one training process. What the pod sets itself wins where it is a setting.

    Not where code comes from: that is loaded from the image, or from what this start of the trainer has compiled.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = work_directory()
    uris = [run.base_model.uri, run.dataset.train.uri, run.dataset.eval.uri if run.dataset.eval else ""]
    defaults = {
        "HOME": str(work),
        "USER": "lora",  # a user without an entry in /etc/passwd has no name, and torch asks for one
        "HF_HOME": str(work / "hf"),
        "HF_HUB_OFFLINE": "0" if any(uri.startswith("hf://") for uri in uris) else "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(max(1, cores // topology.processes)),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    caches = {name: str(state / "code" / directory) for name, directory in CODE_CACHES.items()}
    own = {STATE_DIRECTORY: str(state), "PYTHONUNBUFFERED": "1", **OWN_CODE_ONLY, **caches}
    if topology.world_size > 1:  # one process alone must not look distributed: it would be wrapped in DDP
        own |= {
            "RANK": str(topology.node_rank * topology.processes + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(topology.world_size),
            "LOCAL_WORLD_SIZE": str(topology.processes),
            "MASTER_ADDR": topology.master_address,
            "MASTER_PORT": str(topology.master_port),
        }
    inherited = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        inherited.pop(name, None)
    return {**defaults, **inherited, **own}


class Gang:
    """The training processes of this pod."""

    def __init__(self) -> None:
        self.relay = Relay()
        self.running: dict[int, int] = {}
        self.said: dict[int, deque[str]] = {}
        self.ends: dict[int, ProcessEnd] = {}
        self.killed: set[int] = set()
        self.stop_asked_at: float | None = None
        self.first_failure_at: float | None = None

    def install_handlers(self) -> None:
        """Takes over SIGTERM and SIGINT: they are passed on to the training processes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def start(self, command: list[str], environments: list[dict[str, str]]) -> None:
        """Starts ``command`` once for each environment, each in a session of its own."""
        for local_rank, environment in enumerate(environments):
            with self.relay.channels() as channels:
                process = subprocess.Popen(
                    command,
                    env=environment | channels.environment,
                    stdout=channels.output,
                    stderr=channels.output,
                    pass_fds=[channels.progress],
                    start_new_session=True,
                )
            self.said[local_rank] = channels.last_lines
            process.returncode = 0  # reaped below, for all children at once; Popen must not wait for it too
            self.running[process.pid] = local_rank
        if self.stop_asked_at is not None:  # in between
            self._signal_all(signal.SIGTERM)

    def wait(self) -> None:
        """Returns when every training process has ended. One that outstays a grace period is killed."""
        while self.running:
            self._reap()
            now = time.monotonic()
            if self.first_failure_at is not None and now - self.first_failure_at > peer_grace_seconds():
                self._signal_all(signal.SIGKILL)
            if self.stop_asked_at is not None and now - self.stop_asked_at > stop_grace_seconds():
                self._signal_all(signal.SIGKILL)
            self.relay.pump(POLL_SECONDS)

    def seconds_left(self, most: float) -> float:
        """Of the grace period, if this pod was asked to stop; at most ``most``, and a second or two in any case."""
        if self.stop_asked_at is None:
            return most
        return min(most, max(self.stop_asked_at + stop_grace_seconds() - time.monotonic(), 2.0))

    def kill(self) -> None:
        """Ends what is left."""
        self._signal_all(signal.SIGKILL)

    def _reap(self) -> None:
        """Collects ended children, also orphans that the kernel gave to the first process of the pod."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.running.clear()
                return
            if pid == 0:
                return
            local_rank = self.running.pop(pid, None)
            if local_rank is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            ended_here = code == -signal.SIGKILL and local_rank in self.killed
            self.ends[local_rank] = ProcessEnd(code, time.time(), ended_here)
            if code == STOPPED_EXIT:  # its peers may be too young to have heard of it
                self._pass_on(signal.SIGTERM, None)
            elif code != 0 and self.first_failure_at is None:
                self.first_failure_at = time.monotonic()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.stop_asked_at is None:
            self.stop_asked_at = time.monotonic()
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for pid, local_rank in list(self.running.items()):
            if number == signal.SIGKILL:
                self.killed.add(local_rank)
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                continue


def launch(run_file: Path) -> int:
    """Runs this pod's part of the gang. Returns the exit code of the failure table and writes the last words."""
    gang = Gang()
    gang.install_handlers()
    state: Path | None = None
    run: RunSpec | None = None
    topology: Topology | None = None
    try:
        run = read_run(run_file)
        topology = read_topology(run)
        oom_kills = count_oom_kills()
        state = make_state_directory()
        wait_for_name(topology, gang)
        if gang.stop_asked_at is not None:
            raise StoppedError("asked to stop before the training processes were started")
        environments = [worker_environment(run, topology, rank, state) for rank in range(topology.processes)]
        gang.start(worker_command(run_file), environments)
        gang.wait()
        gang.relay.drain()  # the last lines too
        pod = describe_end(gang, topology, killed_by_memory=count_oom_kills() > oom_kills)
        code, words = conclude(pod, state)
    except TrainerError as error:
        code, words = conclude_without(error.failure_class, str(error))
    except OSError as error:
        found = FailureClass.DISK_FULL if error.errno == errno.ENOSPC else FailureClass.INTERNAL
        code, words = conclude_without(found, f"launcher: {error}")
    finally:
        gang.kill()
        gang.relay.drain()
        if state is not None:
            shutil.rmtree(state, ignore_errors=True)
            shutil.rmtree(fallback_directory(state), ignore_errors=True)
    say(words)
    if code != 0 and run is not None and topology is not None and topology.node_rank == 0:
        leave_expiry(run, words.failure_class or FailureClass.INTERNAL, gang.seconds_left(MOST_SECONDS))
    return code


def make_state_directory() -> Path:
    """A fresh directory below the scratch directory, for this start alone."""
    work = work_directory()
    work.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=work))


def wait_for_name(topology: Topology, gang: Gang) -> None:
    """Waits until rank 0's name resolves: its pod may start later than this one.

    Raises:
        PeerLostError: not within LORA_RENDEZVOUS_SECONDS.
    """
    deadline = time.monotonic() + rendezvous_seconds()
    while gang.stop_asked_at is None:
        try:
            socket.getaddrinfo(topology.master_address, topology.master_port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLostError(f"{topology.master_address}, the pod of rank 0, has no address: {error}") from error
            time.sleep(0.5)
        else:
            return


def describe_end(gang: Gang, topology: Topology, *, killed_by_memory: bool) -> PodEnd:
    """How the processes of ``gang`` ended, with the last lines of each."""
    return PodEnd(
        ends={rank: replace(end, last_lines=tuple(gang.said.get(rank, ()))) for rank, end in gang.ends.items()},
        processes=topology.processes,
        first_rank=topology.node_rank * topology.processes,
        gpus=topology.gpus,
        stopped=gang.stop_asked_at is not None,
        killed_by_memory=killed_by_memory,
    )


def say(words: Termination) -> None:
    """Writes the last words where the kubelet reads them, and on standard error for people."""
    text = words.to_message()
    try:
        termination_log().write_text(text, encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"no termination message could be written: {error}\n")
    sys.stderr.write(text + "\n")

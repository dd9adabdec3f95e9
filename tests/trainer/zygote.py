"""Pods that start in a moment: launchers forked from a process that has imported torch, transformers and TRL.

A start of the trainer spends about ten seconds of a core on imports, for each training process. A test that kills a
gang twenty times cannot pay that. So one process, the zygote, imports everything once and starts nothing: no threads,
no process group. For each pod it forks a launcher, which runs ``lora_trainer.launch`` as it is, with one difference:
its training processes are forked too, where a real launcher executes a new interpreter. Signals, sessions, exit codes,
files and the death of children with their parent are the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class ForkedPod:
    """A launcher that the zygote forked, with the parts of ``subprocess.Popen`` that tests use."""

    def __init__(self, pid: int, exit_file: Path) -> None:
        self.pid = pid
        self._exit_file = exit_file

    def poll(self) -> int | None:
        """The exit code, or ``None`` while it runs."""
        try:
            text = self._exit_file.read_text()
        except FileNotFoundError:
            return None
        return int(text) if text.endswith("\n") else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        deadline = time.monotonic() + (timeout or 180)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked pod", timeout or 180)
            time.sleep(0.01)  # between looks at a condition
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal to the launcher, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the launcher; the kernel ends its training processes with it."""
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The process that forks pods."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, document: Path, environment: Mapping[str, str], log: Path, entry: str = "") -> ForkedPod:
        """Forks a launcher for the run document. ``entry`` (MODULE:FUNCTION) runs in place of the training process."""
        exit_file = log.with_name("exit-code")
        request = {"document": str(document), "environment": dict(environment), "log": str(log), "entry": entry}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"exit": str(exit_file)}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote died"
        return ForkedPod(int(answer), exit_file)


@contextmanager
def run_zygote() -> Iterator[Zygote]:
    """Starts a zygote and ends it, with all that it forked, afterwards."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "crds", ROOT / "trainer_image", ROOT))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "tests.trainer.zygote"]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Zygote(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


# -- in the zygote


def _serve() -> None:
    import lora_trainer.train  # noqa: F401 - what all of this is for
    from lora_trainer.worker import quiet_libraries

    quiet_libraries()
    exits: dict[int, str] = {}
    waker, wakes = os.pipe()
    os.set_blocking(wakes, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    import select

    buffer = b""
    while True:
        ready, _, _ = select.select([0, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
            _reap(exits)
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(waker)
                    os.close(wakes)
                    _become_pod(request)
                exits[pid] = request["exit"]
                sys.stdout.write(f"{pid}\n")
                sys.stdout.flush()


def _reap(exits: dict[int, str]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in exits:
            Path(exits.pop(pid)).write_text(f"{os.waitstatus_to_exitcode(status)}\n")


def _become_pod(request: dict[str, Any]) -> None:
    """The rest of the life of a forked launcher."""
    from lora_trainer.worker import end_with_parent

    code = 99
    try:
        end_with_parent()
        os.environ.update(request["environment"])
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from lora_trainer import launch

        launch.Gang.start = _forking_start(request["entry"])  # type: ignore[method-assign]
        code = launch.launch(Path(request["document"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forking_start(entry: str) -> Callable[..., None]:
    def start(gang: Any, command: list[str], environments: list[dict[str, str]]) -> None:
        for local_rank, environment in enumerate(environments):
            with gang.relay.channels() as channels:
                pid = os.fork()
                if pid == 0:
                    os.dup2(channels.output, 1)
                    os.dup2(channels.output, 2)
                    _become_worker(Path(command[-1]), environment | channels.environment, entry)
            gang.running[pid] = local_rank
            gang.said[local_rank] = channels.last_lines
        if gang.stop_asked_at is not None:
            gang._signal_all(signal.SIGTERM)

    return start


def _become_worker(run_file: Path, environment: dict[str, str], entry: str) -> None:
    code = 99
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        import importlib

        module, _, function = (entry or "lora_trainer.worker:run_worker").partition(":")
        code = getattr(importlib.import_module(module), function)(run_file)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()

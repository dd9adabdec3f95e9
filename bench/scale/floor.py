"""The least that a launch can cost on this machine: a process that makes the operator's calls and does nothing else.

``python -m bench.scale.floor FILE READY``. The calls are those of one launch, Event included, as a proxy has seen the
operator make them. For each run that is created they are sent again, with that run's name in them. No controller that
launches runs by these calls can be faster than this on the same machine, so the ratio of the two is the operator's
own, however slow the machine is.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import uvloop

from bench.scale.client import Access, BenchError, Client, Raw
from bench.scale.process import ROOT, Usage, build_environment, usage
from bench.scale.proxy import Write
from devcluster.pki import Pair

_RUNS = "/apis/lorafinetune.io/v1alpha1/lorafinetunes"
_AT_ONCE = 8
"""Runs that are launched at the same time, as many as the operator's default."""


@dataclass(frozen=True)
class Launch:
    """The calls of one launch, and the metadata of the run that they were made for."""

    metadata: dict[str, str]
    writes: tuple[Write, ...]

    @classmethod
    def of(cls, writes: Sequence[Write]) -> Self:
        """From what the proxy saw of the launch of one run."""
        (status,) = [json.loads(write.body) for write in writes if write.path.partition("?")[0].endswith("/status")]
        return cls(status["metadata"], tuple(writes))

    def for_run(self, run: Raw) -> list[Write]:
        """The same calls for another run, as it was created."""
        old, new = self.metadata, run["metadata"]
        changes = {
            old["uid"]: new["uid"],
            f".{old['uid'][:8]}.": f".{new['uid'][:8]}.",
            old["name"]: new["name"],
            old["namespace"]: new["namespace"],
            f'"{old["resourceVersion"]}"': f'"{new["resourceVersion"]}"',
        }
        return [
            Write(write.method, _replace(write.path, changes), write.content_type, _replace(write.body, changes))
            for write in self.writes
        ]


def _replace(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def in_steps(writes: Sequence[Write]) -> list[list[Write]]:
    """The calls that are made at once, as the operator does: all before the Job; then each alone."""
    job = next(place for place, write in enumerate(writes) if write.path.partition("?")[0].endswith("/jobs"))
    return [list(writes[:job]), *([write] for write in writes[job:])]


async def _serve(client: Client, launch: Launch, ready: Path) -> None:
    places = asyncio.Semaphore(_AT_ONCE)

    async def answer(run: Raw) -> None:
        async with places:
            for together in in_steps(launch.for_run(run)):
                async with asyncio.TaskGroup() as calls:
                    for write in together:
                        calls.create_task(client.send(write.method, write.path, write.body, write.content_type))

    version = await client.newest(_RUNS)
    await asyncio.to_thread(ready.touch)
    async with asyncio.TaskGroup() as group:
        async for kind, run in client.watch(_RUNS, "", version):
            if kind == "ADDED":
                group.create_task(answer(run))


class Floor:
    """The process, on an API server. Use as a context manager."""

    def __init__(self, access: Access, launch: Launch, directory: Path) -> None:
        user = {"certificate": str(access.user.certificate), "key": str(access.user.key)}
        plan = {"url": access.url, "authority": str(access.authority), "user": user, "launch": asdict(launch)}
        file, self._ready = directory / "floor.json", directory / "floor.ready"
        file.write_text(json.dumps(plan))
        self._ready.unlink(missing_ok=True)
        self._command = [sys.executable, "-m", "bench.scale.floor", str(file), str(self._ready)]
        self._process = subprocess.Popen(self._command, env=build_environment(), cwd=ROOT)

    def __enter__(self) -> Self:
        return self

    async def settle(self) -> None:
        """Waits until it sees every run that is created.

        Raises:
            BenchError: it does not for long, or has ended.
        """
        for _ in range(600):
            if self._ready.exists():
                return
            if self._process.poll() is not None:
                break
            await asyncio.sleep(0.1)
        raise BenchError(f"{' '.join(self._command)} does not begin")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def usage(self) -> Usage:
        """What it has used so far."""
        return usage(self._process.pid)


def _read(plan: dict[str, Any]) -> tuple[Access, Launch]:
    user = Pair(Path(plan["user"]["certificate"]), Path(plan["user"]["key"]))
    writes = tuple(Write(**write) for write in plan["launch"]["writes"])
    return Access(plan["url"], Path(plan["authority"]), user), Launch(plan["launch"]["metadata"], writes)


async def _main(access: Access, launch: Launch, ready: Path) -> None:
    async with Client(access) as client:
        await _serve(client, launch, ready)


if __name__ == "__main__":
    uvloop.run(_main(*_read(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])))

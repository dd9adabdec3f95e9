"""What reached the API server, and when, by its own audit log: the same clock for every client."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

OPERATOR = "lora-operator"
"""User of the operator under test."""

RUN_KIND = "lorafinetunes"

_CHILDREN = ("jobs", "services")
_READS = ("get", "list", "watch")


@dataclass(frozen=True, slots=True)
class Call:
    """One request. ``received`` and ``answered`` are seconds since the epoch; ``resource`` has its subresource."""

    received: float
    answered: float
    user: str
    agent: str
    verb: str
    resource: str
    namespace: str
    name: str
    code: int

    @property
    def run(self) -> str:
        """Name of the LoRAFineTune that the call is about, or empty."""
        if self.resource in _CHILDREN:
            return self.name.rpartition("-")[0]
        if self.resource == "events":
            return self.name.split(".")[0]
        if self.resource == "pods/log":
            return self.name.rsplit("-", 3)[0]
        return self.name

    @property
    def writes(self) -> bool:
        """Whether it is there to change something."""
        return self.verb not in _READS

    @property
    def aside(self) -> bool:
        """Events and progress, which the budget of a run leaves out."""
        return self.resource in ("events", "pods/log")


class Audit:
    """Reads the audit log as it grows. The API server moves it aside when it has grown large.

    Calls of ``users`` are of interest, and creations of objects of ``kind`` by anybody.
    """

    def __init__(self, path: Path, users: Sequence[str] = (OPERATOR,), kind: str = RUN_KIND) -> None:
        self._path = path
        self._users = tuple(users)
        self._kind = kind
        self._file: IO[str] | None = None
        self._rest = ""
        self.calls: list[Call] = []

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def read(self) -> list[Call]:
        """The users' calls, and creations of runs by others, since the last look."""
        new = [call for line in self._lines() if (call := parse_call(line, self._users, self._kind)) is not None]
        self.calls += new
        return new

    def mark(self) -> int:
        """Where the log ends now, for ``since``."""
        self.read()
        return len(self.calls)

    def since(self, mark: int) -> list[Call]:
        """The calls after ``mark``."""
        self.read()
        return self.calls[mark:]

    def _lines(self) -> Iterator[str]:
        while True:
            if self._file is None:
                self._file = self._path.open()
            for line in self._file:
                self._rest += line
                if self._rest.endswith("\n"):
                    yield self._rest
                    self._rest = ""
            if self._path.stat().st_ino == Path(f"/proc/self/fd/{self._file.fileno()}").stat().st_ino:
                return
            self._file.close()
            self._file = None


def parse_call(line: str, users: Sequence[str] = (OPERATOR,), kind: str = RUN_KIND) -> Call | None:
    """A line of the log, if it is of interest, and whole: a server that is killed leaves half a line behind."""
    of_users = any(f'"username":"{user}"' in line for user in users)
    if not of_users and not ('"verb":"create"' in line and f'"resource":"{kind}"' in line):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    reference = entry.get("objectRef", {})
    resource, subresource = reference.get("resource", ""), reference.get("subresource", "")
    return Call(
        received=_seconds(entry["requestReceivedTimestamp"]),
        answered=_seconds(entry["stageTimestamp"]),
        user=entry["user"]["username"],
        agent=entry.get("userAgent", "").split(" ")[0],
        verb=entry["verb"],
        resource=f"{resource}/{subresource}" if subresource else resource,
        namespace=reference.get("namespace", ""),
        name=reference.get("name", ""),
        code=entry.get("responseStatus", {}).get("code", 0),
    )


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def by_operator(calls: Iterable[Call]) -> list[Call]:
    """The operator's calls, watches aside."""
    return [call for call in calls if call.user == OPERATOR and call.verb != "watch"]


def by_run(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """The operator's calls by the name of the run that they are about, in order."""
    runs: dict[str, list[Call]] = {}
    for call in by_operator(calls):
        runs.setdefault(call.run, []).append(call)
    return runs


def launch_calls(calls: Iterable[Call]) -> list[Call]:
    """What it took to launch a run, of all its calls: those until its first status was written."""
    launch = []
    for call in calls:
        if not call.aside:
            launch.append(call)
        if call.resource == "lorafinetunes/status" and call.code == 200:
            return launch
    return launch


def life_calls(calls: Iterable[Call]) -> list[Call]:
    """What a whole life took."""
    return [call for call in calls if not call.aside]


def count_calls(calls: Iterable[Call]) -> dict[str, int]:
    """How many calls there were of each kind."""
    counts = Counter(f"{call.verb} {call.resource or 'discovery'}" for call in calls)
    return dict(counts.most_common())

"""``-p tests.support.results --results FILE``: what long tests have shown, as a page of docs/benchmarks.

A test tells what it has measured by ``record_property(what, value)``.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Result:
    """One test: its name in words, how it ended, the seconds it took, and what it has measured."""

    name: str
    outcome: str
    seconds: float
    measured: tuple[tuple[str, object], ...] = ()


def to_markdown(command: str, about: str, results: Sequence[Result], day: str, machine: str) -> str:
    """The page. ``about`` is the first line of the module of the tests."""
    measured = [f"| {result.name} | {what} | {value} |" for result in results for what, value in result.measured]
    table = ["", "| test | what | measured |", "| --- | --- | --- |", *measured] if measured else []
    return "\n".join(
        [
            f"# {command}",
            "",
            f"{about.partition(':')[0].rstrip('.')}. Written by `{command}` on {day}, {machine}.",
            "",
            "| test | result | seconds |",
            "| --- | --- | --- |",
            *(f"| {result.name} | {result.outcome} | {result.seconds:.0f} |" for result in results),
            *table,
            "",
        ]
    )


class Recorder:
    """Collects results, and writes them at the end."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._about = ""
        self._results: list[Result] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Reads what the tests are about that are left to run."""
        modules = [getattr(item, "module", None) for item in session.items]
        self._about = next((str(module.__doc__).splitlines()[0] for module in modules if module), "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps how a test ended. One whose fixtures fail has not been called."""
        if report.when == "call" or not report.passed:
            name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            self._results.append(Result(name, report.outcome, report.duration, tuple(report.user_properties)))

    def pytest_sessionfinish(self) -> None:
        """Writes the page."""
        machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
        command, day = f"make test-{self._file.stem}", datetime.now(UTC).date().isoformat()
        text = to_markdown(command, self._about, self._results, day, machine)
        self._file.write_text(text, encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--results``."""
    parser.addoption("--results", type=Path, help="page to write the results of this session to")


def pytest_configure(config: pytest.Config) -> None:
    """Records where it is asked to."""
    file = config.getoption("--results")
    if file is not None:
        config.pluginmanager.register(Recorder(file))

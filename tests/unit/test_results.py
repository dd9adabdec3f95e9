"""The page of what long tests have shown."""

from pathlib import Path

import pytest

from tests.support.results import Recorder, Result, to_markdown

pytest_plugins = ["pytester"]

TESTS = '''"""Things that go wrong, on a cluster: ``make test-things``."""

import pytest


def test_what_goes_well(record_property):
    record_property("seconds", 12)


def test_what_fails():
    raise AssertionError


@pytest.fixture
def broken():
    raise RuntimeError


def test_what_cannot_begin(broken):
    pass
'''


def test_a_page_has_each_result_and_what_was_measured() -> None:
    results = [
        Result("a node dies", "passed", 61.4, (("seconds to the next attempt", 48),)),
        Result("b", "failed", 2.0),
    ]
    text = to_markdown("make test-nodes", "Nodes that go away, here: ``make``.", results, "2026-11-28", "2 cores")
    assert text.splitlines() == [
        "# make test-nodes",
        "",
        "Nodes that go away, here. Written by `make test-nodes` on 2026-11-28, 2 cores.",
        "",
        "| test | result | seconds |",
        "| --- | --- | --- |",
        "| a node dies | passed | 61 |",
        "| b | failed | 2 |",
        "",
        "| test | what | measured |",
        "| --- | --- | --- |",
        "| a node dies | seconds to the next attempt | 48 |",
    ]


def test_every_test_of_a_session_is_on_the_page(pytester: pytest.Pytester, tmp_path: Path) -> None:
    pytester.makepyfile(test_things=TESTS)
    pytester.inline_run(plugins=[Recorder(tmp_path / "things.md")])
    lines = (tmp_path / "things.md").read_text().splitlines()
    assert lines[0] == "# make test-things"
    assert lines[2].startswith("Things that go wrong, on a cluster. Written by `make test-things`")
    assert [line.split(" | ")[:2] for line in lines if "what " in line and "measured" not in line] == [
        ["| what goes well", "passed"],
        ["| what fails", "failed"],
        ["| what cannot begin", "failed"],
        ["| what goes well", "seconds"],
    ]

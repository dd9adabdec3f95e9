"""The soak, short: 24 runs, one of every kind of story, and a minute of faults of every kind."""

import json
from pathlib import Path

import pytest

from bench.soak.__main__ import main
from bench.soak.report import to_markdown

pytestmark = pytest.mark.controlplane


def test_every_run_ends_as_its_story_says_whatever_fails(tmp_path: Path) -> None:
    code = main(["--tiny", "--seed", "1", "--out", str(tmp_path), "--keep", str(tmp_path / "plane")])
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["wrong"] == []
    assert code == 0
    assert result["runs"] == sum(result["ends"].values()) == 24
    assert len(result["faults"]) >= 8
    assert result["requests"]["passed"] > 100
    assert to_markdown(result) == (tmp_path / "soak.md").read_text()

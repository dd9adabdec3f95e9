"""What a person sees when a step fails, or something is missing."""

from pathlib import Path
from typing import Any

import pytest

from devcluster import cli, preflight
from devcluster.progress import DevclusterError, run_logged, tail, wait_for


def test_a_failing_step_shows_the_end_of_its_log_and_where_the_log_is(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    with pytest.raises(DevclusterError, match=r"making tea: exit code 3; last lines of .*step\.log:\n") as error:
        run_logged("making tea", ["sh", "-c", "seq 100; echo no water >&2; exit 3"], log)
    shown = str(error.value).splitlines()[1:]
    assert shown == [f"    {line}" for line in [*range(87, 101), "no water"]]


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DevclusterError, match="making tea: not done after 0 s"):
        run_logged("making tea", ["sleep", "60"], tmp_path / "log", timeout=0.01)


def test_a_wait_names_what_it_waited_for() -> None:
    with pytest.raises(DevclusterError, match="waiting for the kettle: not so after 0 s"):
        wait_for("the kettle", lambda: None, 0)
    with pytest.raises(DevclusterError, match="waiting for the kettle: it is broken"):
        wait_for("the kettle", lambda: None, 60, failed=lambda: "it is broken")
    assert wait_for("the kettle", lambda: "hot", 0) == "hot"


def test_a_log_that_is_missing_is_said(tmp_path: Path) -> None:
    assert "no log was written" in tail(tmp_path / "none.log")


def test_what_is_missing_is_named_by_its_package() -> None:
    assert preflight.missing_packages({"sh": "dash", "no-such-program": "its-package"}) == ["its-package"]


def test_too_little_disk_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DevclusterError, match="set LORA_CACHE to a folder on a larger disk"):
        preflight.require_free(tmp_path / "not" / "yet", 2**60, "a test")


def test_a_go_that_is_missing_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    from devcluster import binaries

    monkeypatch.setattr(binaries, "_go_version", binaries._go_version.__wrapped__)
    assert cli.main(["binaries"]) == 1
    assert capsys.readouterr().err.startswith("devcluster: no `go` on PATH. Go 1.26 or newer is needed")


def test_a_user_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(DevclusterError, match="run this with sudo, or set KUBECONFIG"):
        preflight.require_root()

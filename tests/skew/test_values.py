"""Today's chart and the values of the release before, as `helm upgrade --reuse-values` puts them together."""

import shutil
import subprocess
from pathlib import Path

from devcluster import binaries
from tests.skew.releases import RECORDED, ROOT


def render(chart: Path) -> str:
    program = str(binaries.ensure(["tools"])["helm"])
    done = subprocess.run([program, "template", "lora-operator", str(chart)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_values_of_the_release_before_give_what_a_new_installation_has(tmp_path: Path) -> None:
    ours, reused = ROOT / "charts" / "lora-operator", tmp_path / "lora-operator"
    shutil.copytree(ours, reused)
    shutil.copy(RECORDED / "values.yaml", reused / "values.yaml")
    assert render(reused) == render(ours)

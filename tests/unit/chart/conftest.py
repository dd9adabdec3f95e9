"""Helm, and the chart rendered by it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from devcluster import binaries

CHART = Path(__file__).resolve().parents[3] / "charts" / "lora-operator"

Helm = Callable[..., str]


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Runs helm and returns what it prints; raises ``ValueError`` with its message."""
    program = binaries.ensure(["tools"])["helm"]

    def run(*arguments: str) -> str:
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(done.stderr + done.stdout)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., str]:
    """The manifests of the chart with values such as ``image.tag=v1``; without the CRD, unless it is asked for."""

    def run(*values: str, crds: bool = False) -> str:
        switches = [f"--set-json={value}" for value in (f"crds.enabled={str(crds).lower()}", *values)]
        return helm("template", "lora-operator", str(CHART), "--namespace=lora-system", *switches)

    return run

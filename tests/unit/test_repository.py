"""Rules about the files of this repository."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read_pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pins.items()}


def test_operator_is_no_package_since_it_would_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_the_images_run_the_versions_that_are_tested() -> None:
    tested = read_pins("dev.txt")
    for image in ("operator.txt", "trainer.txt"):
        pins = read_pins(image)
        assert pins
        assert {package: tested.get(package) for package in pins} == pins, image


def test_every_make_target_is_explained_by_help() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = {name for line in re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE) for name in line.split()}
    output = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    explained = {line.split()[0] for line in output.splitlines() if line.startswith("  ")}
    assert explained == phony


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{document.relative_to(ROOT)} -> {target}"
        for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", re.sub(r"`[^`]*`", "", document.read_text()))
        if not (document.parent / target).exists()
    ]
    assert broken == []

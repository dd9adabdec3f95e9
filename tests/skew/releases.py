"""The three releases that meet in these tests: the one before, today's and the one after."""

from dataclasses import dataclass
from pathlib import Path

from tests.skew import nextrelease
from tools import skew

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "released"
"""What the release before wrote and knew, as files."""


@dataclass(frozen=True)
class Release:
    """``code``: directories for a PYTHONPATH. ``image``: what its chart would name as its trainer."""

    name: str
    code: tuple[Path, ...]
    crds: Path
    image: str


def before() -> Release:
    """The release before, from its wheel (``make skew``)."""
    site = skew.place() / "site"
    assert site.is_dir(), "the release before this one is not built: make skew"
    return Release("before", (site,), RECORDED / "crds", "trainer:before")


def today() -> Release:
    """What is in this repository."""
    code = tuple(ROOT / name for name in ("crds", "operator", "trainer_image"))
    return Release("today", code, ROOT / "crds", "trainer:today")


def after(target: Path) -> Release:
    """The release after, made below ``target``."""
    made = nextrelease.make(target)
    return Release("after", (made,), made / "crds", "trainer:after")

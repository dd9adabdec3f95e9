"""Attacks on the trainer, with the fixtures of its own tests."""

from pathlib import Path

import pytest

from tests.trainer.conftest import (  # noqa: F401 - fixtures
    THIRD_PARTY_WARNINGS,
    _one_thread,
    data,
    fork,
    launch,
    make_run,
    model,
    s3,
    seaweed,
    zygote,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As in tests/trainer: all of them train for real."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.trainer)
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))

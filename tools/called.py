"""A pytest plugin (``-p tools.called``): writes which functions of the operator each test calls.

CALLED_FILE names the file: JSON, from the id of a test to functions as ``path:line`` of where they begin.
"""

import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

_PACKAGE = f"{os.sep}lora_operator{os.sep}"


class Recorder:
    """What is called while a test runs, by whatever thread."""

    def __init__(self) -> None:
        self.called: dict[str, set[CodeType]] = defaultdict(set)
        self._current: set[CodeType] = set()

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """For ``sys.setprofile``."""
        if event == "call" and _PACKAGE in frame.f_code.co_filename:
            self._current.add(frame.f_code)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """One test, its fixtures included."""
        self._current = self.called[item.nodeid]
        threading.setprofile(self.see)
        sys.setprofile(self.see)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def pytest_sessionfinish(self) -> None:
        """After the last test."""
        found = {
            test: sorted(f"{code.co_filename}:{code.co_firstlineno}" for code in codes)
            for test, codes in self.called.items()
        }
        Path(os.environ["CALLED_FILE"]).write_text(json.dumps(found))


def pytest_configure(config: pytest.Config) -> None:
    """Asks pytest to call the recorder."""
    config.pluginmanager.register(Recorder())

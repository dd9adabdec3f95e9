"""The real launcher's last words for each row of the table of GPU errors: a file that trainer and operator are held to.

``tests/trainer/test_gpu_failures.py`` makes the words and compares (``UPDATE_GOLDEN=1`` writes them); the tests of the
operator read them. They have no time.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_trainer.gpuerrors import GpuError

FILE = Path(__file__).with_name("gpuwords.json")
GPU = "GPU-8f2c5a1e-0000-4000-8000-000000000001"
"""The UUID of the GPU, as the device plugin lists it."""


def key_of(row: GpuError) -> str:
    """The row's name in the file."""
    return " + ".join(row.phrases)


def read_words() -> dict[str, dict[str, Any]]:
    """Exit code and last words, by ``key_of`` the row: ``{"exitCode": ..., "words": {...}}``."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    return found


def write_words(words: dict[str, dict[str, Any]]) -> None:
    """Writes the file anew."""
    FILE.write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n")


def termination_at(entry: dict[str, Any], at: datetime) -> str:
    """The termination message of a pod that ended ``at``."""
    return json.dumps(entry["words"] | {"at": at.strftime("%Y-%m-%dT%H:%M:%SZ")})

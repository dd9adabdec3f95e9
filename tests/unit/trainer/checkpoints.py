"""Checkpoints in a store, for tests that do not look into them."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_api.adapter import BaseIdentity, CompleteMarker, StoredFile
from lora_api.run import RunSpec
from lora_trainer.origin import Identity

BASE = BaseIdentity(uri="s3://models/m", digest="sha256:" + "0" * 64)
IDENTITY = Identity(BASE, "sha256:" + "d" * 64)
CONTENT = b"content"
SHA = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"


def make_run(store: Path, resume: dict[str, Any] | None = None, **sections: Any) -> RunSpec:
    document: dict[str, Any] = {
        "namespace": "team",
        "name": "new",
        "uid": "own",
        "baseModel": {"uri": "s3://models/m"},
        "dataset": {"train": {"uri": "file:///data.jsonl"}},
        "training": {"maxSteps": 20, "globalBatchSize": 8},
        "checkpoint": {} if resume is None else {"resumeFrom": resume},
        "publish": {"store": f"file://{store}"},
    }
    return RunSpec.model_validate(document | sections)


def save(store: Path, place: str, step: int, at: float = 0.0, by: RunSpec | None = None, **changes: Any) -> Path:
    """A checkpoint below ``store`` that was complete ``at`` seconds, with the fields of a run of today."""
    directory = store / place / f"step-{step}"
    directory.mkdir(parents=True)
    (directory / "adapter.safetensors").write_bytes(CONTENT)
    run = by or make_run(store)
    marker = CompleteMarker(
        step=step,
        world_size=1,
        global_batch_size=run.training.global_batch_size,
        seed=run.training.seed,
        files=[StoredFile(path="adapter.safetensors", size=len(CONTENT), sha256=SHA)],
        created_at=datetime.now(UTC),
        **(IDENTITY.to_marker(run) | changes),
    )
    (directory / "COMPLETE.json").write_text(json.dumps(marker.to_wire()))
    os.utime(directory / "COMPLETE.json", (1e9 + at, 1e9 + at))
    return directory

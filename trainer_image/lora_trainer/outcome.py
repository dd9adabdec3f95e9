"""How the training processes of a pod tell their launcher what became of them: one small file each."""

import json
from dataclasses import dataclass
from pathlib import Path

from lora_api.failures import MAY_FOLLOW, FailureClass
from lora_api.status import AdapterStatus

RESULT_FILE = "result.json"
BENIGN = (FailureClass.PEER_LOST, FailureClass.CHECKPOINTED)
"""Classes that follow from something else: a lost peer has its own reason, a stop was asked for."""


@dataclass(frozen=True)
class WorkerError:
    """Why one process ended. ``at`` is seconds since the epoch, ``step`` the last optimizer step that is known.

    ``micro_batch_size`` is unset until it is settled, ``checkpoint_step`` until a checkpoint is complete. ``remedy`` is
    set where more is known than of its whole class.
    """

    rank: int
    failure_class: FailureClass
    message: str
    at: float
    step: int | None = None
    micro_batch_size: int | None = None
    remedy: str = ""
    checkpoint_step: int | None = None


def write_error(directory: Path, error: WorkerError) -> None:
    """Leaves ``error`` for the launcher. A full disk must not hide the reason, so it is tried in shared memory too."""
    text = json.dumps({**vars(error), "failure_class": error.failure_class.value})
    for place in (directory, fallback_directory(directory)):
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / f"error-{error.rank}.json").write_text(text, encoding="utf-8")
        except OSError:
            continue
        return


def fallback_directory(directory: Path) -> Path:
    """Where errors go when the scratch disk is full."""
    return Path("/dev/shm") / f"lora-{directory.name}"  # noqa: S108 - the pod's own


def read_errors(directory: Path) -> list[WorkerError]:
    """The errors of all processes. A file that was cut while it was written counts for nothing."""
    found = []
    for place in (directory, fallback_directory(directory)):
        for path in sorted(place.glob("error-*.json")):
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
                found.append(WorkerError(**{**value, "failure_class": FailureClass(value["failure_class"])}))
            except (ValueError, TypeError, KeyError):
                continue
    return found


def write_result(directory: Path, adapter: AdapterStatus) -> None:
    """Leaves the published adapter for the launcher."""
    (directory / RESULT_FILE).write_text(json.dumps(adapter.to_wire()), encoding="utf-8")


def read_result(directory: Path) -> AdapterStatus | None:
    """The published adapter, if this pod published it."""
    path = directory / RESULT_FILE
    return AdapterStatus.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def root_cause(errors: list[WorkerError]) -> WorkerError | None:
    """The error that explains the others: the earliest that is not the consequence of another."""
    found = {error.failure_class for error in errors}

    def order(error: WorkerError) -> tuple[bool, bool, float, int]:
        kind = error.failure_class
        return kind in BENIGN, MAY_FOLLOW.get(kind) in found, error.at, error.rank

    return min(errors, key=order, default=None)

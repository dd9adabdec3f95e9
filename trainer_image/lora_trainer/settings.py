"""The trainer's surroundings, from the environment: which process this is, where it may write, how long it waits.

What to train is in the run document; nothing of that is here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_api.run import MASTER_PORT, TERMINATION_LOG, WORK_DIRECTORY

STATE_DIRECTORY = "LORA_STATE_DIR"
PROGRESS_DESCRIPTOR = "LORA_PROGRESS_FD"


@dataclass(frozen=True)
class Place:
    """Which of the gang's processes this is."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and publishes for the gang."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process fetches files for its pod."""
        return self.local_rank == 0


def read_place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place, as the launcher set it. A process without a launcher is alone."""
    return Place(int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0")), int(env.get("WORLD_SIZE", "1")))


def local_processes(env: Mapping[str, str] = os.environ) -> int:
    """Training processes of this pod, as the launcher set them."""
    return int(env.get("LOCAL_WORLD_SIZE", "1"))


def work_directory(env: Mapping[str, str] = os.environ) -> Path:
    """Writable scratch directory (LORA_WORK, else the pods' /scratch)."""
    return Path(env.get("LORA_WORK", WORK_DIRECTORY))


def state_directory(env: Mapping[str, str] = os.environ) -> Path:
    """Directory of this start of the trainer, below the scratch directory. The launcher makes it (LORA_STATE_DIR)."""
    return Path(env.get(STATE_DIRECTORY, str(work_directory(env) / "run")))


def progress_descriptor(env: Mapping[str, str] = os.environ) -> int | None:
    """The open file that progress lines go to (LORA_PROGRESS_FD, set by the launcher); ``None``: standard output."""
    text = env.get(PROGRESS_DESCRIPTOR)
    return None if text is None else int(text)


def termination_log(env: Mapping[str, str] = os.environ) -> Path:
    """Where the kubelet looks for the last words (LORA_TERMINATION_LOG)."""
    return Path(env.get("LORA_TERMINATION_LOG", TERMINATION_LOG))


def seconds(name: str, default: float, env: Mapping[str, str] = os.environ) -> float:
    """The length of time in the variable ``name``, in seconds."""
    return float(env.get(name, default))


def rendezvous_seconds() -> float:
    """How long a process waits for all others to appear. Covers slow image pulls and downloads on other nodes."""
    return seconds("LORA_RENDEZVOUS_SECONDS", 1800)


def rendezvous_address(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where rank 0 listens, as the launcher set them."""
    return env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", MASTER_PORT))


def store_retry_seconds() -> float:
    """How long one operation on the store is tried again before the store counts as down."""
    return seconds("LORA_STORE_RETRY_SECONDS", 60)


def store_timeout_seconds() -> float:
    """How long one request to the store may take, its body included. Requests carry at most ``store.CHUNK`` bytes."""
    return seconds("LORA_STORE_TIMEOUT_SECONDS", 60)


def peer_grace_seconds() -> float:
    """How long the other processes of a pod may take to end by themselves after one has failed."""
    return seconds("LORA_PEER_GRACE_SECONDS", 10)


def stop_grace_seconds() -> float:
    """How long a checkpoint may take after SIGTERM. Keep it below the pod's terminationGracePeriodSeconds."""
    return seconds("LORA_STOP_GRACE_SECONDS", 25)


def publish_seconds() -> float:
    """How long the other processes wait until rank 0 has uploaded the adapter and read it back."""
    return seconds("LORA_PUBLISH_SECONDS", 3600)


def tracking_seconds() -> float:
    """How long the trackers may take to send the rest at the end of a run."""
    return seconds("LORA_TRACKING_SECONDS", 20)

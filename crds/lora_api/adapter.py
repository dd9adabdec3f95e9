"""The adapter in the store: layout, digest and the files that describe it. Written by the trainer, read by serving."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from lora_api._base import Measure, RecordModel, Time
from lora_api.served import ServedEvaluation

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
"""The adapter's own files: these, and only these, make its digest."""

MANIFEST_FILE = "manifest.json"
COMPLETE_FILE = "COMPLETE.json"
EXPIRES_FILE = "EXPIRES.json"

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM 0.33 takes for --max-lora-rank."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


_PART = r"\.?[A-Za-z0-9_][A-Za-z0-9_.\-]*"


class StoredFile(RecordModel):
    """One file of a directory in the store.

    ``path`` is relative to the directory, with ``/`` between its parts. No part is ``.`` or ``..``: a reader may join
    it to a local directory.
    """

    path: Annotated[str, StringConstraints(pattern=rf"^{_PART}(/{_PART})*$", max_length=512)]
    size: int = Field(ge=0)
    sha256: Sha256


class AdapterManifest(RecordModel):
    """``manifest.json``, written last and create-only: a reader that sees it sees every file that it names.

    ``files`` are the adapter's own, ``extras`` are for people (model card, report, metrics). ``lora`` is what the run
    asked for. adapter_config.json has it as servers read it: one rank, one alpha, and no rsLoRA. Evaluation losses and
    shares are those of all evaluation records on the base model that was trained on, ``served`` has those on the base
    model as it is served, and ``gate_base`` says which of them publish.gate looked at. ``yardstick`` is what they were
    measured on and with (``yardstick.RunYardstick``). Manifests of earlier releases have the losses alone.
    ``resumed_from`` is the checkpoint of another run that this one began with.
    """

    schema_version: int = Field(1, ge=1)
    digest: Digest
    name: str
    namespace: str
    base_model: str
    base_model_revision: str | None = None
    rank: int = Field(ge=1)
    lora: dict[str, Any] = {}
    yardstick: dict[str, Any] = {}
    files: list[StoredFile]
    extras: list[StoredFile] = []
    eval_loss_before: Measure = None
    eval_loss_after: Measure = None
    eval_share_after: Measure = None
    served: ServedEvaluation | None = None
    gate_base: str | None = None
    resumed_from: str | None = None
    created_at: Time
    created_by: dict[str, Any] = {}


class MergedManifest(RecordModel):
    """``manifest.json`` of a whole model with an adapter merged into it, written last and create-only."""

    schema_version: int = Field(1, ge=1)
    adapter_digest: Digest
    name: str
    namespace: str
    base_model: str
    base_model_revision: str | None = None
    files: list[StoredFile]
    created_at: Time


class VersionPointer(RecordModel):
    """``versions/v<N>.json``, create-only: version N of an adapter's name is the directory with this digest."""

    schema_version: int = Field(1, ge=1)
    version: int = Field(ge=1)
    digest: Digest
    run_uid: str
    created_at: Time


class BaseIdentity(RecordModel):
    """The base model that an adapter was trained on: ``digest`` over its files, or ``revision`` on a model hub."""

    uri: str
    revision: str | None = None
    digest: str | None = None

    def is_same(self, other: "BaseIdentity") -> bool:
        """Whether the two are surely the same model, wherever it lies."""
        if self.digest is not None and other.digest is not None:
            return self.digest == other.digest
        return self.revision is not None and (self.uri, self.revision) == (other.uri, other.revision)

    def to_text(self) -> str:
        """For people."""
        return f"{self.uri} ({self.digest or self.revision})"


class CompleteMarker(RecordModel):
    """``COMPLETE.json`` of a checkpoint, written last. A checkpoint without it does not exist.

    ``run`` is the name of the LoRAFineTune; ``base_model``, ``lora``, ``objective`` and ``optimizer`` are what has to
    be the same in another run that goes on from there; ``data`` is a digest of what is learned from, in its order.
    Earlier releases wrote none of these.
    """

    schema_version: int = Field(1, ge=1)
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    seed: int | None = None
    run: str | None = None
    base_model: BaseIdentity | None = None
    lora: dict[str, Any] | None = None
    objective: str | None = None
    optimizer: str | None = None
    data: str | None = None
    retain_hours: int | None = Field(None, ge=1)
    files: list[StoredFile]
    created_at: Time


class ExpiryMarker(RecordModel):
    """``EXPIRES.json`` beside ``COMPLETE.json``: an attempt of ``run`` ended without success, and no other has begun.

    The checkpoint may be deleted after ``expires_at``. That is by the clock of whoever wrote it, so it has to be
    ``retain_hours`` since this object was written by the store's clock, too.
    """

    version: int = Field(1, ge=1)
    run: str
    expires_at: Time
    retain_hours: int = Field(ge=1)
    why: str = ""


def compute_digest(files: Iterable[StoredFile]) -> str:
    """``sha256:HEX`` over the canonical JSON of the adapter's own files, sorted by path.

    Times and the order of ``files`` do not matter; equal bytes have equal digests.

    Raises:
        ValueError: one of the adapter's own files is missing or named twice.
    """
    entries = sorted(
        ({"path": f.path, "size": f.size, "sha256": f.sha256} for f in files if f.path in ADAPTER_FILES),
        key=lambda entry: str(entry["path"]),
    )
    if [entry["path"] for entry in entries] != sorted(ADAPTER_FILES):
        raise ValueError(f"the digest needs each of {', '.join(ADAPTER_FILES)} once")
    canonical = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def adapter_prefix(namespace: str, name: str) -> str:
    """Path below the store's prefix that holds all that belongs to one adapter's name."""
    return f"{namespace}/{name}"


def digest_directory(digest: str) -> str:
    """Directory of the adapter with ``digest`` below its name's prefix: ``sha256-HEX``."""
    return digest.replace(":", "-")


def merged_directory(digest: str) -> str:
    """Directory of the whole model that the adapter with ``digest`` is merged into, below its name's prefix.

    It is not inside the adapter's directory: readers of that download everything below it.
    """
    return f"merged/{digest_directory(digest)}"


def version_path(version: int) -> str:
    """Path of a version pointer below the name's prefix."""
    return f"versions/v{version}.json"


def parse_version_path(path: str) -> int | None:
    """Version of the pointer at ``path``, or ``None`` if it is none."""
    match = re.search(r"(?:^|/)versions/v([1-9][0-9]{0,9})\.json\Z", path)
    return int(match.group(1)) if match else None


def refused_directory(uid: str) -> str:
    """Directory of the report of a run that publish.gate refused, below the name's prefix."""
    return f"refused/{uid}"


CHECKPOINTS = "checkpoints"
"""Directory of all runs' checkpoints below the name's prefix."""


def checkpoints_directory(uid: str) -> str:
    """Directory of a run's checkpoints below the name's prefix."""
    return f"{CHECKPOINTS}/{uid}"


def step_directory(step: int) -> str:
    """Directory of one checkpoint below those of its run."""
    return f"step-{step}"


def parse_checkpoint_step(path: str) -> int | None:
    """Step of the checkpoint that ``path`` lies in, or ``None`` if it lies in none. ``path`` is below its run's."""
    match = re.match(r"step-([0-9]{1,10})(?:/|\Z)", path)
    return int(match.group(1)) if match else None


def serving_max_lora_rank(rank: int) -> int:
    """Smallest --max-lora-rank of vLLM that serves an adapter of ``rank`` (1 to 512).

    Raises:
        ValueError: ``rank`` is out of range.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is smaller than 1")
    for legal in VLLM_LORA_RANKS:
        if rank <= legal:
            return legal
    raise ValueError(f"rank {rank} is larger than {VLLM_LORA_RANKS[-1]}, the most that vLLM serves")

"""What can go wrong, and which row of the failure table it is.

TrainerError
 ├─ BadSpecError           the specification cannot work
 ├─ BadDataError           a record is not as its format asks
 ├─ ModelNotFoundError     base model or dataset is not there
 ├─ AuthDeniedError        store or hub refused the credentials
 ├─ DivergedError          loss or gradient is not finite
 ├─ PeerLostError          another process of the gang is gone or silent
 ├─ StoreUnavailableError  store or hub kept failing
 ├─ GateRefusedError       the adapter is not as good as publish.gate asks
 ├─ SourceChangedError     model or dataset is not what the preflight checked
 ├─ WeightsChangedError    packed weights are not those that were loaded
 ├─ DiskFullError          no space left on the scratch disk
 ├─ GPUUnavailableError    fewer GPUs than the pod was promised
 ├─ GPUUnsupportedError    the GPU lacks what the run asks of it
 ├─ StoppedError           asked to stop (SIGTERM); what there was to save is saved
 └─ InternalError          a fault of the trainer

Imports neither torch nor obstore, so that the launcher starts fast: foreign exceptions are told by their names, and
those of GPUs and of what joins them by their texts (``gpuerrors``).
"""

import errno
from dataclasses import dataclass
from typing import ClassVar

from lora_api.failures import FailureClass
from lora_trainer.gpuerrors import find_gpu_error


class TrainerError(Exception):
    """An error with a row in the failure table."""

    failure_class: ClassVar[FailureClass] = FailureClass.INTERNAL


class BadSpecError(TrainerError):
    """The specification cannot work."""

    failure_class = FailureClass.BAD_SPEC


class BadDataError(TrainerError):
    """A record of the dataset is not as its format asks."""

    failure_class = FailureClass.BAD_DATA


class ModelNotFoundError(TrainerError):
    """The base model or the dataset is not where its uri points."""

    failure_class = FailureClass.MODEL_NOT_FOUND


class AuthDeniedError(TrainerError):
    """The store or the model hub refused the credentials."""

    failure_class = FailureClass.AUTH_DENIED


class DivergedError(TrainerError):
    """Loss or gradient is no longer a finite number."""

    failure_class = FailureClass.DIVERGED


class PeerLostError(TrainerError):
    """Another process of the gang is gone, or did not answer in time."""

    failure_class = FailureClass.PEER_LOST


class StoreUnavailableError(TrainerError):
    """The object store or the model hub did not answer, or kept failing."""

    failure_class = FailureClass.STORE_UNAVAILABLE


class GateRefusedError(TrainerError):
    """The adapter is not as good as publish.gate asks; nothing was published."""

    failure_class = FailureClass.GATE_REFUSED


class SourceChangedError(TrainerError):
    """The base model or the dataset is no longer what the preflight checked."""

    failure_class = FailureClass.SOURCE_CHANGED


class WeightsChangedError(TrainerError):
    """Packed weights of the base model are not those that were loaded."""

    failure_class = FailureClass.WEIGHTS_CHANGED


class DiskFullError(TrainerError):
    """The scratch disk is full."""

    failure_class = FailureClass.DISK_FULL


class GPUUnavailableError(TrainerError):
    """The pod has fewer GPUs than it was promised."""

    failure_class = FailureClass.GPU_UNAVAILABLE


class GPUUnsupportedError(TrainerError):
    """The GPU lacks what the run asks of it."""

    failure_class = FailureClass.GPU_UNSUPPORTED


class StoppedError(TrainerError):
    """The run was asked to stop, and what there was to save is saved."""

    failure_class = FailureClass.CHECKPOINTED


class InternalError(TrainerError):
    """A fault of the trainer."""


PEER_PHRASES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "connectfullmesh failed",
    "socket timeout",
    "wait timeout",
    "nccl",
    "watchdog caught collective operation timeout",
    "timed out after",
    "failed to recv",
    "processgroup",
    "gloo",
)
"""Parts of what gloo, NCCL and the TCP store say (torch 2.13) when another process is gone."""

_PEER_TYPES = {"DistNetworkError", "DistBackendError", "DistStoreError", "DistQueueEmptyError"}
_OUT_OF_MEMORY_TYPES = {"OutOfMemoryError"}
_NOT_FOUND_TYPES = {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "DatasetNotFoundError"}
_OF_LIBRARIES = (RuntimeError, OSError, ImportError, ValueError, AssertionError)
"""What torch, bitsandbytes, transformers and the loader of libraries raise. Others may quote records."""

_BROKEN_TYPES = {"SafetensorError"}
_AUTH_TYPES = {"GatedRepoError", "PermissionDeniedError", "UnauthenticatedError"}


@dataclass(frozen=True)
class Finding:
    """The class of an error. ``remedy`` is set where more is known than what helps against all of the class."""

    failure_class: FailureClass
    remedy: str = ""


def classify(error: BaseException) -> FailureClass:
    """The row of the failure table for ``error``; its causes are looked at too. ``INTERNAL`` where nothing fits."""
    return find(error).failure_class


def find(error: BaseException) -> Finding:
    """As ``classify``, with the remedy."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        found = _find_one(current)
        if found is not None:
            return found
        current = current.__cause__ or current.__context__
    return Finding(FailureClass.INTERNAL)


def _find_one(error: BaseException) -> Finding | None:
    if isinstance(error, TrainerError):
        return Finding(error.failure_class)
    if isinstance(error, _OF_LIBRARIES) and (row := find_gpu_error(str(error))) is not None:
        return Finding(row.failure_class, row.remedy)
    found = _classify_one(error)
    return None if found is None else Finding(found)


def _classify_one(error: BaseException) -> FailureClass | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    module = type(error).__module__
    text = str(error).lower()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FailureClass.DISK_FULL
    if "no space left on device" in text or "disk quota exceeded" in text:
        return FailureClass.DISK_FULL
    if isinstance(error, MemoryError):
        return FailureClass.HOST_OUT_OF_MEMORY
    if names & _OUT_OF_MEMORY_TYPES:
        return FailureClass.GPU_OUT_OF_MEMORY
    if names & _AUTH_TYPES:
        return FailureClass.AUTH_DENIED
    if names & (_NOT_FOUND_TYPES | _BROKEN_TYPES) or (module.startswith("obstore") and "NotFoundError" in names):
        return FailureClass.MODEL_NOT_FOUND
    if module.startswith("obstore"):
        return FailureClass.STORE_UNAVAILABLE
    if names & _PEER_TYPES:
        return FailureClass.PEER_LOST
    if isinstance(error, RuntimeError | ConnectionError) and any(phrase in text for phrase in PEER_PHRASES):
        return FailureClass.PEER_LOST
    return None


def describe(error: BaseException) -> str:
    """``error`` for people: its own words for errors of ours, with the type's name for all others."""
    text = str(error).strip()
    if isinstance(error, TrainerError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""Reads models and datasets from a model hub (hf://ORG/NAME): Hugging Face's, or the one that HF_ENDPOINT names.

What is fetched lies in the hub's cache below HF_HOME, so that with HF_HUB_OFFLINE=1 a cache that came with the image or
a volume is enough. Each wait is bounded, and the hub's errors become rows of the failure table.
"""

import errno
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from lora_trainer.errors import (
    AuthDeniedError,
    BadDataError,
    BadSpecError,
    ModelNotFoundError,
    StoreUnavailableError,
    TrainerError,
)
from lora_trainer.settings import store_retry_seconds

Result = TypeVar("Result")

_PUBLIC_FILES = ("README.md", ".gitattributes")
_NOT_FOUND = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)


def fetch_snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Directory with the files of the model ``name`` that match ``patterns``.

    Raises:
        ModelNotFoundError: repository or revision are not there, or (HF_HUB_OFFLINE) not in the cache.
        AuthDeniedError: the repository is gated, or HF_TOKEN was refused.
        StoreUnavailableError: the hub kept failing for LORA_STORE_RETRY_SECONDS.
    """

    def fetch() -> Path:
        commit = _resolve(name, "model", revision)
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns)))

    return _call(_say(name, revision), fetch)


def fetch_split(name: str, revision: str | None, split: str, file: Path) -> None:
    """Writes one split of the dataset ``name`` to the Parquet file ``file``, whatever form it has on the hub.

    Raises:
        ModelNotFoundError: repository, revision or split are not there, or (HF_HUB_OFFLINE) not in the cache.
        AuthDeniedError: the repository is gated, or HF_TOKEN was refused.
        BadDataError: its files cannot be read as a dataset.
        StoreUnavailableError: the hub kept failing for LORA_STORE_RETRY_SECONDS.
    """
    from datasets import load_dataset

    def fetch() -> None:
        commit = _resolve(name, "dataset", revision)
        load_dataset(name, revision=commit, split=split).to_parquet(file)

    file.parent.mkdir(parents=True, exist_ok=True)
    _call(f"{_say(name, revision)}, split {split}", fetch)


def is_offline() -> bool:
    """Whether nothing is fetched: what is in the cache is all there is (HF_HUB_OFFLINE)."""
    return bool(constants.is_offline_mode())


def resolve(name: str, kind: str, revision: str | None) -> str | None:
    """The commit of ``revision`` of the model or dataset ``name``; offline ``revision`` itself.

    Raises:
        ModelNotFoundError: repository or revision are not there.
        AuthDeniedError: the repository is gated, or HF_TOKEN was refused.
        StoreUnavailableError: the hub kept failing for LORA_STORE_RETRY_SECONDS.
    """
    return _call(_say(name, revision), lambda: _resolve(name, kind, revision))


def list_files(name: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit of ``revision`` of the model ``name``, and the sizes of its files in bytes, by path.

    Raises:
        ModelNotFoundError: repository or revision are not there.
        AuthDeniedError: the repository is gated, or HF_TOKEN was refused.
        StoreUnavailableError: the hub kept failing for LORA_STORE_RETRY_SECONDS.
    """

    def fetch() -> tuple[str, dict[str, int]]:
        commit = str(_resolve(name, "model", revision))
        tree = HfApi().list_repo_tree(name, recursive=True, revision=commit)
        return commit, {file.path: int(file.size) for file in tree if isinstance(file, RepoFile)}

    return _call(_say(name, revision), fetch)


def read_range(name: str, commit: str, path: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` (not with it) of a file of the model ``name``.

    Raises:
        ModelNotFoundError: it is not there.
        AuthDeniedError: the repository is gated, or HF_TOKEN was refused.
        StoreUnavailableError: the hub kept failing for LORA_STORE_RETRY_SECONDS.
    """

    def fetch() -> bytes:
        _limit_waits()
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        with get_session().stream("GET", hf_hub_url(name, path, revision=commit), headers=headers) as answer:
            if answer.is_error:
                answer.read()  # the hub says in it why
            hf_raise_for_status(answer)
            whole = answer.status_code != httpx2.codes.PARTIAL_CONTENT  # a proxy that knows no ranges
            skipped = start if whole else 0
            return _read_at_most(answer, skipped + end - start)[skipped:]

    return _call(f"{_say(name, commit)}, {path}", fetch)


def _read_at_most(answer: httpx2.Response, size: int) -> bytes:
    """The first ``size`` bytes of the body: a hub may send more than it was asked for."""
    body = bytearray()
    for piece in answer.iter_bytes():
        body += piece
        if len(body) >= size:
            break
    return bytes(body[:size])


def _say(name: str, revision: str | None) -> str:
    return f"hf://{name}" + (f", revision {revision}" if revision else "")


def _resolve(name: str, kind: str, revision: str | None) -> str | None:
    """The commit of ``revision``, whose files may be read; offline ``revision`` itself.

    The libraries that fetch would look it up themselves, but datasets forgets why it was refused (5.2), and neither
    limits the wait for an answer (huggingface_hub 2.4).
    """
    if constants.is_offline_mode():
        return revision
    _limit_waits()
    wait = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=wait)
    # Everybody may see what a gated repository holds, and read its card; only another file shows who may read it.
    names = [file.rfilename for file in info.siblings or [] if file.rfilename not in _PUBLIC_FILES]
    if names:
        get_hf_file_metadata(hf_hub_url(name, names[0], repo_type=kind, revision=info.sha), timeout=wait)
    sha: str = info.sha
    return sha


def _limit_waits() -> None:
    """Gives requests without a timeout the one of HF_HUB_ETAG_TIMEOUT (10 s): the hub's client has none by itself."""
    hooks = get_session().event_hooks["request"]
    if _limit_wait not in hooks:
        hooks = [*hooks, _limit_wait]
        set_client_factory(lambda: httpx2.Client(event_hooks={"request": hooks}, follow_redirects=True, timeout=None))


def _limit_wait(request: httpx2.Request) -> None:
    limits = request.extensions.get("timeout", {})
    default = constants.HF_HUB_ETAG_TIMEOUT
    request.extensions["timeout"] = {
        kind: default if limits.get(kind) is None else limits[kind] for kind in ("connect", "read", "write", "pool")
    }


def _call(where: str, operation: Callable[[], Result]) -> Result:
    """Runs ``operation``, again where that can help, and turns the errors of the hub's libraries into ours."""
    seconds = store_retry_seconds()
    deadline = time.monotonic() + seconds
    pause = 0.2
    while True:
        try:
            return operation()
        except Exception as error:
            ours = _translate(where, error)
            if not isinstance(ours, StoreUnavailableError):
                if ours is None:
                    raise
                raise ours from error
            if time.monotonic() + pause > deadline:
                raise StoreUnavailableError(
                    f"{where}: no success at the model hub {constants.ENDPOINT} within {seconds:.0f} s: {ours}"
                ) from error
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(pause * 2, 5.0)


def _translate(where: str, error: BaseException) -> TrainerError | None:
    """The row of the failure table for ``error``: that of the nearest cause that tells. ``None`` where none does."""
    chain = list(_chain(error))
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return None
    if constants.is_offline_mode() and isinstance(error, OSError):
        return ModelNotFoundError(
            f"{where}: it is not in the cache {constants.HF_HOME}, and HF_HUB_OFFLINE forbids to fetch it"
        )
    for each in chain:
        ours = _translate_one(where, each)
        if ours is not None:
            return ours
    if any(isinstance(each, LocalEntryNotFoundError) for each in chain):
        return StoreUnavailableError(_words(error))
    return None


def _translate_one(where: str, error: BaseException) -> TrainerError | None:
    if isinstance(error, GatedRepoError) or (_status(error) in (401, 403) and not isinstance(error, _NOT_FOUND)):
        gated = isinstance(error, GatedRepoError)
        terms = " Accept its terms on its page, and put a token of that account into HF_TOKEN." if gated else ""
        return AuthDeniedError(f"{where}: the model hub refused (HTTP {_status(error)}): {_words(error)}{terms}")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(f"{where}: there is no such revision: {_words(error)}")
    if isinstance(error, _NOT_FOUND) or _status(error) == 404:
        return ModelNotFoundError(
            f"{where}: the model hub {constants.ENDPOINT} has no such repository, or it is private and HF_TOKEN may "
            f"not read it: {_words(error)}"
        )
    if isinstance(error, HFValidationError):
        return BadSpecError(f"{where}: {_words(error)}")
    if any(kind.__name__ == "DatasetGenerationError" for kind in type(error).__mro__):
        cause = error.__cause__ or error
        return BadDataError(f"{where}: the files cannot be read: {type(cause).__name__}: {_words(cause)}")
    if isinstance(error, HfHubHTTPError | httpx2.TransportError | ConnectionError | TimeoutError):
        return StoreUnavailableError(f"{type(error).__name__}: {_words(error)}")
    if isinstance(error, LocalEntryNotFoundError):  # says only that there is no copy in the cache: its cause tells why
        return None
    if isinstance(error, FileNotFoundError | ValueError):
        return ModelNotFoundError(f"{where}: {_words(error)}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _status(error: BaseException) -> int:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 0


def _words(error: BaseException) -> str:
    """What the hub said, else what ``error`` says, in one line."""
    said = error.server_message if isinstance(error, HfHubHTTPError) else None
    return " ".join((said or str(error)).split())[:500]

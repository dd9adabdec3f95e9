"""The object store: a prefix in a bucket (s3://BUCKET/PREFIX) or a directory (file:///PATH), through obstore.

Every request has a time limit (LORA_STORE_TIMEOUT_SECONDS), also where the other side accepts the connection and then
says nothing, or stops in the middle of a body. Where trying again can help, an operation is tried again with growing
pauses until LORA_STORE_RETRY_SECONDS have passed, at least once. Large files move in pieces, so that no single request
is long. ``Store.within`` shortens both, for what has to be done before a deadline.
"""

import errno
import functools
import hashlib
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    InvalidPathError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from lora_api.adapter import StoredFile
from lora_trainer.errors import AuthDeniedError, BadSpecError, ModelNotFoundError, StoreUnavailableError
from lora_trainer.settings import store_retry_seconds, store_timeout_seconds

CHUNK = 16 * 1024 * 1024
"""Bytes in one request of a download, and the size from which an upload is in parts."""

CONNECTIONS = 4

Result = TypeVar("Result")


@dataclass(frozen=True)
class Listed:
    """An object in a listing. ``modified`` is by the store's clock."""

    size: int
    modified: datetime


class ObjectNotFoundError(ModelNotFoundError):
    """There is no object at a path. Callers that look for an object that may be missing catch it."""


def split_uri(uri: str) -> tuple[str, str]:
    """``(scheme, rest)`` of ``scheme://rest``.

    Raises:
        BadSpecError: ``uri`` is no URI.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or not rest:
        raise BadSpecError(f"{uri!r} is not a URI such as s3://BUCKET/PATH")
    return scheme, rest


def join(*parts: str) -> str:
    """Path of the non-empty ``parts``, with one ``/`` between them."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can be joined to a directory as that of a file in it, and leads nowhere else."""
    return bool(name) and "/" not in name and "\0" not in name and name not in (".", "..")


def file_digest(path: Path) -> str:
    """SHA-256 of the file at ``path``, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path, name: str) -> StoredFile:
    """The entry of a manifest for the file at ``path``, as ``name``."""
    return StoredFile(path=name, size=path.stat().st_size, sha256=file_digest(path))


def read_region(env: Mapping[str, str] = os.environ) -> str:
    """The region in AWS_REGION.

    It is a part of the host name that AWS is reached by, and comes from the Secret of a run. One such as
    ``x@example.org/#`` would have another server asked, which is not the Secret's to say.

    Raises:
        BadSpecError: it is no region.
    """
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", region):
        raise BadSpecError("AWS_REGION (spec.credentials) is no region: it may have letters, digits and - only")
    return region


class Store:
    """Objects below one URI. Paths are relative to it."""

    def __init__(self, uri: str, retry_seconds: float | None = None) -> None:
        self.uri = uri.rstrip("/")
        self.retry_seconds = store_retry_seconds() if retry_seconds is None else retry_seconds
        self._deadline = math.inf
        self._timeout = store_timeout_seconds()
        self._store = self._open(self._timeout)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Within it, no operation goes on for longer than until ``seconds`` from now, retries included."""
        before = self._store, self._timeout, self._deadline
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._store, self._timeout, self._deadline = before

    def _hurry(self, path: str) -> None:
        """Gives the next request no more time than is left.

        Raises:
            StoreUnavailableError: there is none left.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StoreUnavailableError(f"{self.url(path)}: no time is left")
        if left < self._timeout * 0.8:
            self._timeout = left
            self._store = self._open(left)

    def _open(self, timeout: float) -> S3Store | LocalStore:
        scheme, rest = split_uri(self.uri)
        if scheme == "file":
            return LocalStore(prefix=Path("/" + rest.lstrip("/")), mkdir=True)
        if scheme != "s3":
            raise BadSpecError(f"{self.uri}: the store must start with s3:// or file://")
        bucket, _, prefix = rest.partition("/")
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=read_region(),
            client_options={"allow_http": True, "connect_timeout": "5s", "timeout": timedelta(seconds=timeout)},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )

    def url(self, path: str) -> str:
        """The full URI of ``path``."""
        return f"{self.uri}/{path}" if path else self.uri

    def get(self, path: str) -> bytes:
        """Content of the object at ``path``.

        Raises:
            ObjectNotFoundError: there is none.
        """
        return self._call(path, lambda: bytes(obstore.get(self._store, path).bytes()))

    def put(self, path: str, content: bytes) -> None:
        """Writes ``content`` to ``path``, over what is there. Readers see all of it or nothing."""
        self._call(path, lambda: obstore.put(self._store, path, content))

    def create(self, path: str, content: bytes) -> bool:
        """Writes ``content`` to ``path`` if nothing is there. Among many writers, one gets ``True``.

        A writer whose answer was lost on the way finds its own bytes when it tries again: that counts as written.
        """
        try:
            self._call(path, lambda: obstore.put(self._store, path, content, mode="create", use_multipart=False))
        except AlreadyExistsError:
            return self.get(path) == content
        return True

    def upload(self, source: Path, path: str) -> None:
        """Copies the file ``source`` to ``path``, in parts where it is large."""
        self._call(path, lambda: obstore.put(self._store, path, source, chunk_size=CHUNK, max_concurrency=CONNECTIONS))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of all objects below the directory ``prefix``, by path, in the order of their paths."""
        return {path: entry.size for path, entry in self.listing(prefix).items()}

    def listing(self, prefix: str = "") -> dict[str, Listed]:
        """The same with times."""
        directory = prefix.strip("/")
        found = self._call(directory, lambda: obstore.list(self._store, directory or None).collect())
        entries = {str(entry["path"]): Listed(int(entry["size"]), entry["last_modified"]) for entry in found}
        inside = directory + "/" if directory else ""
        return {path: entries[path] for path in sorted(entries) if path.startswith(inside)}

    def now(self, path: str) -> datetime:
        """The time by the store's clock: that of an object which is written to ``path`` for it, and deleted."""
        self.put(path, b"what time is it")
        found: datetime = self._call(path, lambda: obstore.head(self._store, path)["last_modified"])
        self.delete([path])
        return found

    def entries(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and etag of all objects, by path: what tells one state of the store from another."""
        found = self._call("", lambda: obstore.list(self._store).collect())
        return {str(one["path"]): (int(one["size"]), str(one.get("e_tag") or "")) for one in found}

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (not with it) of the object at ``path``.

        Raises:
            ObjectNotFoundError: there is none.
        """
        return self._call(path, lambda: bytes(obstore.get_range(self._store, path, start=start, end=end)))

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes objects. One that is gone already is no error."""
        for path in paths:
            try:
                self._call(path, functools.partial(obstore.delete, self._store, path))
            except ObjectNotFoundError:
                continue

    def download(self, path: str, target: Path, size: int | None = None) -> None:
        """Copies the object at ``path`` to the file ``target``, several pieces at a time.

        Raises:
            ObjectNotFoundError: there is none.
            DiskFullError: by its errno, where the disk is full.
        """
        length = int(self._call(path, lambda: obstore.head(self._store, path)["size"])) if size is None else size
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            descriptor = file.fileno()

            def fetch(start: int) -> None:
                end = min(start + CHUNK, length)
                piece = self._call(path, lambda: obstore.get_range(self._store, path, start=start, end=end))
                written = 0
                while written < len(piece):
                    written += os.pwrite(descriptor, memoryview(piece)[written:], start + written)

            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(fetch, range(0, length, CHUNK)))

    def download_directory(
        self, prefix: str, target: Path, wanted: Callable[[str], bool] = lambda name: True
    ) -> list[Path]:
        """Copies the objects below ``prefix`` whose relative name is ``wanted`` to ``target``. Returns the files.

        Objects directly at ``prefix`` count too, so that ``prefix`` may name one object.

        Raises:
            BadSpecError: the name of an object leads out of ``target``.
        """
        inside = prefix.strip("/") + "/" if prefix.strip("/") else ""
        files = []
        for path, size in self.sizes(prefix).items():
            name = path.removeprefix(inside)
            if wanted(name):
                if not all(map(is_plain_name, name.split("/"))):
                    raise BadSpecError(f"{self.url(path)}: the name of this object cannot be that of a file; rename it")
                self.download(path, target / name, size)
                files.append(target / name)
        return files

    def _call(self, path: str, operation: Callable[[], Result]) -> Result:
        """Runs ``operation``, again where that can help, and turns obstore's errors into ours."""
        started, pause, tries = time.monotonic(), 0.1, 0
        while True:
            tries += 1
            self._hurry(path)
            try:
                return operation()
            except AlreadyExistsError:
                raise
            except (PermissionDeniedError, UnauthenticatedError) as error:
                raise AuthDeniedError(f"{self.url(path)}: {_first_line(error)}") from error
            except (NotFoundError, FileNotFoundError) as error:
                raise ObjectNotFoundError(f"{self.url(path)}: there is no such object or bucket") from error
            except InvalidPathError as error:  # also of an object that a listing comes by
                raise BadSpecError(f"{self.url(path)}: {_first_line(error)}; rename or delete that object") from error
            except (GenericError, TimeoutError, ConnectionError) as error:
                self._raise_permanent(path, error)
                resume_at = time.monotonic() + pause
                tired = tries > 1 and resume_at > started + self.retry_seconds
                if tired or resume_at > self._deadline:
                    seconds = max(min(self.retry_seconds, self._deadline - started), time.monotonic() - started)
                    raise StoreUnavailableError(
                        f"{self.url(path)}: no success within {seconds:.0f} s and {tries} tries: {_first_line(error)}"
                    ) from error
                time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(pause * 2, 5.0)

    def _raise_permanent(self, path: str, error: BaseException) -> None:
        """Raises our error where trying again cannot help. obstore has no class of its own for failures of listings."""
        if "No space left on device" in str(error):  # behind a file:// store
            raise OSError(errno.ENOSPC, "No space left on device") from error
        found = re.search(r"status code: (\d{3})", str(error))
        status = int(found.group(1)) if found else 0
        if status in (401, 403):
            raise AuthDeniedError(f"{self.url(path)}: {_first_line(error)}") from error
        if status == 404:
            raise ObjectNotFoundError(f"{self.url(path)}: there is no such object or bucket") from error
        if 400 <= status < 500 and status not in (408, 429):
            raise StoreUnavailableError(f"{self.url(path)}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What ``error`` says, without obstore's debug dump."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:500]

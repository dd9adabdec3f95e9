"""A base model before its weights are fetched: its small files on disk, and pieces of its weights on demand."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_api.preflight import SourcePin
from lora_api.sources import BaseModelSource, DataSource
from lora_trainer import hub
from lora_trainer.errors import BadSpecError, ModelNotFoundError
from lora_trainer.headers import (
    INDEX_FILE,
    LENGTH_BYTES,
    Header,
    check_index,
    choose_shards,
    header_length,
    parse_header,
)
from lora_trainer.sources import (
    DATA_SUFFIXES,
    MAX_DESCRIPTION,
    MAX_SMALL_FILE,
    MODEL_SUFFIXES,
    WEIGHTS,
    find_model_files,
    local_path,
    read_description,
)
from lora_trainer.store import Store, split_uri

FIRST_PIECE = 256 * 1024
"""Bytes that are asked for first: the whole header of most files."""

CONNECTIONS = 8
MAX_TENSORS = 1_000_000
WHOLE_DIGEST = 64 * 1024 * 1024
"""Files up to this size are read for their digest; of larger ones the first and the last piece, and the size."""

SMALL_SUFFIXES = tuple(suffix for suffix in MODEL_SUFFIXES if suffix != WEIGHTS)

ReadRange = Callable[[str, int, int], bytes]
"""``read(name, start, end)``: bytes ``start`` to ``end`` (not with it) of a file."""


@dataclass(frozen=True)
class ModelFiles:
    """A model whose configuration and tokenizer are in ``directory``. ``sizes`` are those of its weight files."""

    directory: Path
    pin: SourcePin
    sizes: dict[str, int]
    read: ReadRange


def open_model(source: BaseModelSource, target: Path) -> ModelFiles:
    """The model at ``source``; its small files come to ``target`` where they are not mounted or cached.

    Raises:
        ModelNotFoundError: it is not there.
        AuthDeniedError: the credentials were refused.
        StoreUnavailableError: the store or the model hub kept failing.
    """
    scheme, rest = split_uri(source.uri)
    mounted = local_path(source.uri)
    if mounted is not None:
        found = _open_directory(source.uri, mounted, None)
    elif scheme == "hf":
        found = _open_hub(source, rest)
    else:
        found = _open_store(source.uri, target)
    if not (found.directory / "config.json").exists():
        raise ModelNotFoundError(f"{source.uri}: no config.json there. A model is a directory in Hugging Face layout")
    return found


def read_json_object(file: Path) -> dict[str, Any]:
    """The content of a file of the model.

    Raises:
        BadSpecError: it is not one JSON object.
    """
    size = file.stat().st_size
    if size > MAX_DESCRIPTION:
        raise BadSpecError(f"baseModel: {file.name}: has {size} bytes, and may have {MAX_DESCRIPTION}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSpecError(f"baseModel: {file.name}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadSpecError(f"baseModel: {file.name}: must be an object, and is {str(content)[:40]}")
    return content


def pin_model(source: BaseModelSource, directory: Path) -> SourcePin:
    """What ``source`` holds, a store or a mounted directory; its files were fetched to ``directory``.

    Raises:
        AuthDeniedError: the credentials were refused.
        StoreUnavailableError: the store kept failing.
    """
    if split_uri(source.uri)[0] == "s3":
        return _pin_objects(source.uri, _model_entries(Store(source.uri)))
    return _pin_files(source.uri, find_model_files(source.uri, directory))


def read_headers(files: ModelFiles) -> dict[str, Header]:
    """The tensors in each file of weights, from the files' headers alone.

    Raises:
        ModelNotFoundError: a file that is needed is not there, is cut, or is no safetensors file.
    """
    path = files.directory / INDEX_FILE
    index = read_description(files.pin.uri, path) if path.exists() else None
    try:
        shards = choose_shards(index, files.sizes)
        headers = _read_all(files, shards)
        if index is not None and len(shards) > 1:
            check_index(index, headers)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{files.pin.uri}: {error}") from error
    return headers


def _read_all(files: ModelFiles, shards: list[str]) -> dict[str, Header]:
    """The headers of all files, some at a time.

    Raises:
        ModelNotFoundError: together they have more than MAX_TENSORS tensors.
    """
    headers: dict[str, Header] = {}
    tensors = 0
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for start in range(0, len(shards), CONNECTIONS):
            some = shards[start : start + CONNECTIONS]
            headers |= zip(some, pool.map(lambda name: _read_header(files, name), some), strict=True)
            tensors += sum(len(headers[name]) for name in some)
            if tensors > MAX_TENSORS:
                raise ModelNotFoundError(f"its first {len(headers)} files have {tensors} tensors: no model has")
    return headers


def _read_header(files: ModelFiles, name: str) -> Header:
    size = files.sizes[name]
    piece = files.read(name, 0, min(size, FIRST_PIECE)) if size else b""
    end = LENGTH_BYTES + header_length(piece, name, size)
    if end > len(piece):
        piece += files.read(name, len(piece), end)
    return parse_header(piece[LENGTH_BYTES:end], name, size)


def pin_data(source: DataSource, files: Iterable[Path]) -> SourcePin:
    """What ``source`` held. ``files`` are those that were fetched from it.

    Raises:
        ModelNotFoundError: it is not there any more.
        StoreUnavailableError: the store or the model hub kept failing.
    """
    scheme, rest = split_uri(source.uri)
    if scheme == "hf":
        found = list(files)
        commit = hub.resolve(rest, "dataset", source.revision)
        size = sum(file.stat().st_size for file in found)
        return SourcePin(uri=source.uri, revision=commit, files=len(found), size_bytes=size)
    if scheme == "s3":
        single = source.uri.endswith(DATA_SUFFIXES)
        parent, _, name = source.uri.rpartition("/")
        entries = Store(parent if single else source.uri).entries()
        wanted = {
            path: one for path, one in entries.items() if (path == name if single else path.endswith(DATA_SUFFIXES))
        }
        return _pin_objects(source.uri, wanted)
    return _pin_files(source.uri, list(files))


def _open_directory(uri: str, directory: Path, revision: str | None) -> ModelFiles:
    found = find_model_files(uri, directory)
    sizes = {file.name: file.stat().st_size for file in found if file.name.endswith(WEIGHTS)}

    def read(name: str, start: int, end: int) -> bytes:
        with (directory / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    pin = _pin_files(uri, found)
    if revision is not None:
        pin = pin.model_copy(update={"revision": revision, "digest": None})
    return ModelFiles(directory, pin, sizes, read)


def _open_store(uri: str, target: Path) -> ModelFiles:
    store = Store(uri)
    entries = _model_entries(store)
    target.mkdir(parents=True, exist_ok=True)
    for name, (size, _) in entries.items():
        if name.endswith(SMALL_SUFFIXES):
            if size > MAX_SMALL_FILE:
                raise ModelNotFoundError(
                    f"{uri}: {name}: has {size} bytes, and a file beside the weights may have {MAX_SMALL_FILE}"
                )
            store.download(name, target / name, size)
    sizes = {name: size for name, (size, _) in entries.items() if name.endswith(WEIGHTS)}
    return ModelFiles(target, _pin_objects(uri, entries), sizes, store.get_range)


def _model_entries(store: Store) -> dict[str, tuple[int, str]]:
    """Size and etag of the files of a model, by name."""
    return {name: entry for name, entry in store.entries().items() if "/" not in name and name.endswith(MODEL_SUFFIXES)}


def _open_hub(source: BaseModelSource, name: str) -> ModelFiles:
    directory = hub.fetch_snapshot(name, source.revision, [f"*{suffix}" for suffix in SMALL_SUFFIXES])
    if hub.is_offline():
        return _open_directory(source.uri, directory, directory.name)
    commit, sizes = hub.list_files(name, source.revision)
    wanted = {path: size for path, size in sizes.items() if "/" not in path and path.endswith(MODEL_SUFFIXES)}

    def read(path: str, start: int, end: int) -> bytes:
        return hub.read_range(name, commit, path, start, end)

    pin = SourcePin(uri=source.uri, revision=commit, files=len(wanted), size_bytes=sum(wanted.values()))
    return ModelFiles(directory, pin, {path: size for path, size in wanted.items() if path.endswith(WEIGHTS)}, read)


def _pin_objects(uri: str, entries: dict[str, tuple[int, str]]) -> SourcePin:
    lines = [f"{name} {size} {tag}" for name, (size, tag) in sorted(entries.items())]
    total = sum(size for size, _ in entries.values())
    return SourcePin(uri=uri, digest=_digest(lines), files=len(lines), size_bytes=total)


def _pin_files(uri: str, files: list[Path]) -> SourcePin:
    lines = [f"{file.name} {file.stat().st_size} {_content_digest(file)}" for file in sorted(files)]
    return SourcePin(uri=uri, digest=_digest(lines), files=len(files), size_bytes=sum(f.stat().st_size for f in files))


def _digest(lines: list[str]) -> str:
    return "sha256:" + hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _content_digest(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= WHOLE_DIGEST:
            return hashlib.file_digest(content, "sha256").hexdigest()
        ends = content.read(FIRST_PIECE)
        content.seek(size - FIRST_PIECE)
        return hashlib.sha256(ends + content.read(FIRST_PIECE)).hexdigest()

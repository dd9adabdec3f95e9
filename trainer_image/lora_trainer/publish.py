"""Publishes an adapter: files under their digest, the manifest last, then a version that counts up.

Cut at any point, it leaves either no manifest or a whole adapter. Run again, it goes on where it was cut: files are
named by their content, and the manifest and the version are created only once.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_api.adapter import (
    ADAPTER_FILES,
    MANIFEST_FILE,
    AdapterManifest,
    StoredFile,
    VersionPointer,
    adapter_prefix,
    compute_digest,
    digest_directory,
    merged_directory,
    parse_version_path,
    serving_max_lora_rank,
    version_path,
)
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.adapter import model_name
from lora_trainer.errors import StoreUnavailableError
from lora_trainer.store import ObjectNotFoundError, Store, describe_file, join
from lora_trainer.yardstick import describe_yardstick

CLAIM_TRIES = 100


def upload_adapter(store: Store, run: RunSpec, directory: Path) -> list[StoredFile]:
    """Uploads the adapter's own files from ``directory``. Nobody sees them before ``publish_adapter``.

    Bytes that were published before are not uploaded again.
    """
    files = [describe_file(directory / name, name) for name in ADAPTER_FILES]
    target = adapter_directory(run, compute_digest(files))
    if not has_manifest(store, target):
        for file in files:
            store.upload(directory / file.path, join(target, file.path))
    return files


def publish_adapter(
    store: Store,
    run: RunSpec,
    files: list[StoredFile],
    extras: list[Path],
    figures: Mapping[str, Any],
    created_by: dict[str, Any],
) -> str:
    """Makes the uploaded ``files`` an adapter: ``extras``, further files for people, and then its manifest.

    ``figures`` are those fields of the manifest that say how good it is. Returns its digest. It has no version yet.
    """
    digest = compute_digest(files)
    target = adapter_directory(run, digest)
    if not has_manifest(store, target):
        manifest = AdapterManifest(
            digest=digest,
            name=run.adapter_name,
            namespace=run.namespace,
            base_model=model_name(run.base_model.uri),
            base_model_revision=run.base_model.revision,
            rank=run.lora.published_rank,
            lora=run.lora.to_wire(),
            yardstick=describe_yardstick(run),
            files=files,
            extras=[_create_extra(store, source, join(target, source.name)) for source in extras],
            created_at=datetime.now(UTC),
            created_by=created_by,
            **figures,
        )
        store.create(join(target, MANIFEST_FILE), json.dumps(manifest.to_wire(), indent=1).encode())
    return digest


def publish_version(store: Store, run: RunSpec, digest: str) -> AdapterStatus:
    """Gives the adapter its version. Publishing the same bytes again gives the same one."""
    root = adapter_prefix(run.namespace, run.adapter_name)
    return describe_published(store, root, digest, claim_version(store, root, digest, run.uid))


def adapter_directory(run: RunSpec, digest: str) -> str:
    """Where the adapter with ``digest`` is, below the store's prefix."""
    return join(adapter_prefix(run.namespace, run.adapter_name), digest_directory(digest))


def claim_version(store: Store, root: str, digest: str, uid: str) -> int:
    """The version of ``digest``: the one it has, or the next number. Safe among concurrent publishers.

    Raises:
        StoreUnavailableError: others took every number that this one tried.
    """
    for _ in range(CLAIM_TRIES):
        pointers = read_pointers(store, root)
        for pointer in pointers.values():
            if pointer.digest == digest:
                return pointer.version
        version = max(pointers, default=0) + 1
        pointer = VersionPointer(version=version, digest=digest, run_uid=uid, created_at=datetime.now(UTC))
        if store.create(join(root, version_path(version)), json.dumps(pointer.to_wire()).encode()):
            return version
    raise StoreUnavailableError(f"{store.url(root)}: {CLAIM_TRIES} versions in a row were taken by other publishers")


def read_pointers(store: Store, root: str) -> dict[int, VersionPointer]:
    """All version pointers below an adapter's name, by version."""
    found = {}
    for path in store.sizes(join(root, "versions")):
        version = parse_version_path(path)
        if version is not None:
            found[version] = VersionPointer.model_validate_json(store.get(path))
    return found


def find_published(store: Store, run: RunSpec) -> AdapterStatus | None:
    """What an earlier attempt of this run has published already, if it was cut right after it."""
    root = adapter_prefix(run.namespace, run.adapter_name)
    for pointer in read_pointers(store, root).values():
        if pointer.run_uid == run.uid:
            return describe_published(store, root, pointer.digest, pointer.version)
    return None


def describe_published(store: Store, root: str, digest: str, version: int) -> AdapterStatus:
    """The published adapter, read back from its manifest."""
    target = join(root, digest_directory(digest))
    manifest = AdapterManifest.model_validate_json(store.get(join(target, MANIFEST_FILE)))
    merged = join(root, merged_directory(digest))
    return AdapterStatus(
        uri=store.url(target),
        merged_uri=store.url(merged) if has_manifest(store, merged) else None,
        digest=digest,
        version=version,
        served_name=f"{manifest.name}-v{version}",
        rank=manifest.rank,
        serving_max_lora_rank=serving_max_lora_rank(manifest.rank),
        size_bytes=sum(file.size for file in manifest.files),
        eval_loss_before=manifest.eval_loss_before,
        eval_loss_after=manifest.eval_loss_after,
        eval_share_after=manifest.eval_share_after,
        served=manifest.served,
        gate_base=manifest.gate_base,
    )


def has_manifest(store: Store, target: str) -> bool:
    """Whether the directory ``target`` is whole."""
    try:
        store.get(join(target, MANIFEST_FILE))
    except ObjectNotFoundError:
        return False
    return True


def _create_extra(store: Store, source: Path, path: str) -> StoredFile:
    """Uploads a file for people, once: the manifest describes the bytes that are there, whoever wrote them first."""
    if not store.create(path, source.read_bytes()):
        source.write_bytes(store.get(path))
    return describe_file(source, source.name)

"""Publishing on a real S3 store: whole or not there, one version for equal bytes, and many publishers at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import obstore
import pytest

from lora_api.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterManifest,
    compute_digest,
    digest_directory,
)
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.publish import find_published, publish_adapter, publish_version, read_pointers, upload_adapter
from lora_trainer.store import ObjectNotFoundError, Store, describe_file
from tests.support.seaweed import Seaweed

Make = Callable[..., RunSpec]
EXTRAS = ["README.md", "report.html"]


def make_adapter(directory: Path, content: str) -> Path:
    """Files as an adapter has them. Publishing does not look into them."""
    directory.mkdir(parents=True)
    (directory / ADAPTER_CONFIG).write_text('{"r": 4}')
    (directory / ADAPTER_WEIGHTS).write_bytes(content.encode() * 1000)
    for name in EXTRAS:
        (directory / name).write_text(f"{name} of {content}")
    return directory


def publish(store: Store, run: RunSpec, directory: Path) -> AdapterStatus:
    """Publishes ``directory`` with all its files."""
    files = upload_adapter(store, run, directory)
    extras = [directory / name for name in EXTRAS]
    figures = {"eval_loss_before": 2.0, "eval_loss_after": 1.0}
    return publish_version(store, run, publish_adapter(store, run, files, extras, figures, {"trainer": "test"}))


def check_readable(store: Store, root: str) -> int:
    """Checks that each manifest names files that are there, byte for byte. Returns how many manifests there are."""
    manifests = [path for path in store.sizes(root) if path.endswith("/manifest.json")]
    for path in manifests:
        manifest = AdapterManifest.model_validate_json(store.get(path))
        directory = path.removesuffix("manifest.json")
        assert directory == f"{root}/{digest_directory(manifest.digest)}/"
        assert compute_digest(manifest.files) == manifest.digest
        for file in [*manifest.files, *manifest.extras]:
            content = store.get(directory + file.path)
            assert (len(content), _sha256(content)) == (file.size, file.sha256), file.path
    return len(manifests)


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


class KilledError(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("after", [False, True], ids=["before the write", "after the write"])
def test_an_upload_killed_at_any_write_leaves_no_half_adapter(
    after: bool, make_run: Make, s3: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"killed-{after}".lower()
    run = make_run(publish={"store": s3.uri("adapters"), "name": name})
    store, root = Store(run.publish.store), f"tests/{name}"
    adapter = make_adapter(tmp_path / "adapter", "weights")
    real_put = obstore.put
    for cut in count(1):
        writes = count(1)

        def put(*arguments: Any, cut: int = cut, writes: Any = writes, **options: Any) -> Any:
            number = next(writes)
            if number == cut and not after:
                raise KilledError
            result = real_put(*arguments, **options)
            if number == cut:
                raise KilledError
            return result

        monkeypatch.setattr(obstore, "put", put)
        try:
            status = publish(store, run, adapter)
        except KilledError:
            check_readable(store, root)
            for pointer in read_pointers(store, root).values():
                assert check_readable(store, root) == 1, f"v{pointer.version} points to nothing"
        else:
            break
        finally:
            monkeypatch.setattr(obstore, "put", real_put)
        assert publish(store, run, adapter).version == 1
        store.delete(store.sizes(root))
    assert cut == 7  # config, weights, two extras, manifest, version; the seventh round was not cut
    assert status.version == 1


def test_equal_bytes_are_one_version_and_the_first_manifest_stays(make_run: Make, s3: Seaweed, tmp_path: Path) -> None:
    run = make_run(publish={"store": s3.uri("adapters"), "name": "same"})
    store = Store(run.publish.store)
    adapter = make_adapter(tmp_path / "one", "weights")
    first = publish(store, run, adapter)
    (adapter / "README.md").write_text("another card")
    again = publish(store, run.model_copy(update={"uid": "uid-2"}), adapter)
    assert again == first
    assert check_readable(store, "tests/same") == 1
    assert find_published(store, run) == first
    assert find_published(store, run.model_copy(update={"uid": "uid-2"})) is None
    assert first.size_bytes == sum(
        describe_file(adapter / name, name).size for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    )


def test_sixteen_publishers_at_once_get_sixteen_versions(make_run: Make, s3: Seaweed, tmp_path: Path) -> None:
    run = make_run(publish={"store": s3.uri("adapters"), "name": "crowd"})

    def one(number: int) -> AdapterStatus:
        own = run.model_copy(update={"uid": f"uid-{number}"})
        return publish(Store(run.publish.store), own, make_adapter(tmp_path / str(number), f"weights {number}"))

    with ThreadPoolExecutor(16) as pool:
        adapters = list(pool.map(one, range(16)))
    assert sorted(adapter.version for adapter in adapters) == list(range(1, 17))
    assert len({adapter.digest for adapter in adapters}) == 16
    store = Store(run.publish.store)
    assert check_readable(store, "tests/crowd") == 16
    pointers = read_pointers(store, "tests/crowd")
    assert {adapter.version: adapter.digest for adapter in adapters} == {
        version: pointer.digest for version, pointer in pointers.items()
    }


def test_many_publishers_of_equal_bytes_agree_on_one_version(make_run: Make, s3: Seaweed, tmp_path: Path) -> None:
    run = make_run(publish={"store": s3.uri("adapters"), "name": "twins"})
    directories = [make_adapter(tmp_path / str(number), "weights") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        adapters = list(pool.map(lambda directory: publish(Store(run.publish.store), run, directory), directories))
    assert {adapter.version for adapter in adapters} == {1}
    assert check_readable(Store(run.publish.store), "tests/twins") == 1


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_the_store(scheme: str, s3: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both kinds of store must do."""
    import lora_trainer.store

    monkeypatch.setattr(lora_trainer.store, "CHUNK", 5 * 1024**2)  # the smallest part that S3 takes
    store = Store(s3.uri("plain") if scheme == "s3" else f"file://{tmp_path}/plain")
    assert store.sizes("a") == {}
    assert store.create("a/one", b"1")
    assert store.create("a/one", b"1"), "the same writer, whose answer was lost"
    assert not store.create("a/one", b"2")
    store.put("a/one", b"22")
    store.put("ab/other", b"")
    assert store.sizes("a") == {"a/one": 2}
    assert list(store.sizes()) == ["a/one", "ab/other"]
    content = bytes(range(256)) * 50_000  # 12.8 MB: three parts
    (tmp_path / "big").write_bytes(content)
    store.upload(tmp_path / "big", "a/big")
    store.download("a/big", tmp_path / "copy" / "big")
    assert (tmp_path / "copy" / "big").read_bytes() == content
    files = store.download_directory("a", tmp_path / "all", lambda name: name != "one")
    assert files == [tmp_path / "all" / "big"]
    store.delete(["a/one", "a/one", "a/big"])
    with pytest.raises(ObjectNotFoundError, match="a/one"):
        store.get("a/one")

"""Checkpoints in a store that a kill may leave in any state."""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import CompleteMarker, ExpiryMarker
from lora_api.run import RunSpec
from lora_trainer.catalog import Catalog
from lora_trainer.errors import BadSpecError
from lora_trainer.store import Store

FILES = ("adapter.safetensors", "optimizer.safetensors", "rng-0.json")


def make_run(keep: int = 2, **training: int) -> RunSpec:
    return RunSpec.model_validate(
        {
            "namespace": "tests",
            "name": "tiny",
            "uid": "uid-1",
            "baseModel": {"uri": "file:///model"},
            "dataset": {"train": {"uri": "file:///data.jsonl"}},
            "training": {"maxSteps": 8, "globalBatchSize": 8, "seed": 3, **training},
            "checkpoint": {"keep": keep},
            "publish": {"store": "file:///unused"},
        }
    )


class Killed(BaseException):
    """The process is gone."""


class MortalStore(Store):
    """A store whose client dies right before its n-th operation, counted from 0."""

    def __init__(self, uri: str, operations: int) -> None:
        super().__init__(uri)
        self.left = operations

    def _call(self, path: str, operation: Callable[[], Any]) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super()._call(path, operation)


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step}".encode() * 7


def save(catalog: Catalog, step: int, scratch: Path, make: Callable[[int, str], bytes] = content) -> None:
    """What ``checkpoint.Checkpoints.save`` does to the store."""
    catalog.begin(step)
    files = []
    for name in FILES:
        (scratch / name).write_bytes(make(step, name))
        files.append(catalog.upload(step, scratch / name))
    catalog.complete(
        CompleteMarker(step=step, world_size=1, global_batch_size=8, seed=3, files=files, created_at=datetime.now(UTC))
    )
    catalog.prune()


def resumable(store: Store, keep: int, scratch: Path) -> int | None:
    """Step of the newest checkpoint that can be read back whole, byte for byte. None of the others may claim to be."""
    catalog = Catalog(store, make_run(keep))
    steps = []
    for marker in catalog.complete_ones():
        assert catalog.fetch(marker, FILES, scratch / "back") is None
        for name in FILES:
            assert (scratch / "back" / name).read_bytes() == content(marker.step, name)
        steps.append(marker.step)
    return steps[0] if steps else None


@pytest.fixture
def place(tmp_path: Path) -> Callable[[], tuple[str, Path]]:
    """URIs of empty stores, each with a scratch directory."""
    numbers = iter(range(1000))

    def fresh() -> tuple[str, Path]:
        number = next(numbers)
        scratch = tmp_path / f"scratch-{number}"
        scratch.mkdir()
        return f"file://{tmp_path}/store-{number}", scratch

    return fresh


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_before_any_operation_leaves_a_checkpoint_to_go_on_from(
    keep: int, place: Callable[[], tuple[str, Path]]
) -> None:
    operations = 0
    while True:
        uri, scratch = place()
        reached, finished = None, False
        store = MortalStore(uri, operations)
        catalog = Catalog(store, make_run(keep))
        with suppress(Killed):
            for step in (2, 4, 6, 8):
                save(catalog, step, scratch)
                reached = step
            finished = True
        found = resumable(Store(uri), keep, scratch)
        assert found is not None or reached is None
        assert found is None or found >= (reached or 0)
        if finished:
            break
        again = Catalog(Store(uri), make_run(keep))  # and the next attempt goes on over what was left
        for step in range((found or 0) + 2, 9, 2):
            save(again, step, scratch)
        again.prune()
        assert resumable(Store(uri), keep, scratch) == 8
        assert len(again.complete_ones()) == min(keep, 4)
        operations += 1
    assert operations > 30


def test_a_damaged_checkpoint_that_is_written_again_is_at_no_time_taken_for_a_whole_one(
    place: Callable[[], tuple[str, Path]],
) -> None:
    """Its marker names files of the same sizes, so the marker must go before they come."""
    operations, finished = 0, False
    while not finished:
        uri, scratch = place()
        save(Catalog(Store(uri), make_run()), 4, scratch, lambda step, name: content(step, name).swapcase())
        Store(uri).put(Catalog(Store(uri), make_run()).path(4, FILES[0]), b"short")
        with suppress(Killed):
            save(Catalog(MortalStore(uri, operations), make_run()), 4, scratch)
            finished = True
        found = resumable(Store(uri), 2, scratch)
        assert found == 4 if finished else found in (None, 4)
        operations += 1
    assert operations > len(FILES)


def test_a_kill_in_the_deletion_of_all_leaves_the_newest_or_nothing(
    place: Callable[[], tuple[str, Path]],
) -> None:
    operations, seen = 0, set()
    while True:
        uri, scratch = place()
        for step in (2, 4):
            save(Catalog(Store(uri), make_run()), step, scratch)
        store = MortalStore(uri, operations)
        try:
            Catalog(store, make_run()).delete_all()
        except Killed:
            seen.add(resumable(Store(uri), 2, scratch))
        else:
            break
        operations += 1
    assert seen == {4, None}
    assert Store(uri).sizes() == {}


@pytest.mark.parametrize("name", FILES)
def test_a_bit_flip_in_any_file_is_seen(name: str, place: Callable[[], tuple[str, Path]]) -> None:
    uri, scratch = place()
    store = Store(uri)
    catalog = Catalog(store, make_run())
    save(catalog, 2, scratch)
    (marker,) = catalog.complete_ones()
    whole = store.get(catalog.path(2, name))
    for bit in range(0, len(whole) * 8, 13):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        store.put(catalog.path(2, name), bytes(flipped))
        problem = catalog.fetch(marker, FILES, scratch / "back")
        assert problem is not None
        assert name in problem
        assert "SHA-256" in problem


BROKEN: dict[str, Callable[[Store, Catalog], None]] = {
    "a file is gone": lambda store, catalog: store.delete([catalog.path(6, FILES[1])]),
    "a file is cut": lambda store, catalog: store.put(catalog.path(6, FILES[1]), b"short"),
    "its marker is cut": lambda store, catalog: store.put(catalog.path(6, "COMPLETE.json"), b"{"),
    "its marker is gone": lambda store, catalog: catalog.condemn(6),
    "its marker is of another step": lambda store, catalog: store.put(
        catalog.path(6, "COMPLETE.json"), store.get(catalog.path(4, "COMPLETE.json"))
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_does_not_count_and_pushes_no_good_one_out(
    case: str, place: Callable[[], tuple[str, Path]]
) -> None:
    uri, scratch = place()
    store = Store(uri)
    catalog = Catalog(store, make_run(keep=1))
    wide = Catalog(store, make_run(keep=5))
    save(wide, 4, scratch)
    save(wide, 6, scratch)
    BROKEN[case](store, catalog)
    assert [marker.step for marker in catalog.complete_ones()] == [4]
    catalog.prune()
    assert resumable(store, 1, scratch) == 4


def test_where_one_is_kept_it_is_read_back_before_the_older_one_goes(
    place: Callable[[], tuple[str, Path]],
) -> None:
    uri, scratch = place()
    store = Store(uri)
    wide, narrow = Catalog(store, make_run(keep=5)), Catalog(store, make_run(keep=1))
    save(wide, 4, scratch)
    save(wide, 6, scratch)
    good = store.get(narrow.path(6, FILES[0]))
    store.put(narrow.path(6, FILES[0]), bytes(len(good)))
    narrow.prune()
    assert [marker.step for marker in narrow.complete_ones()] == [6, 4]
    store.put(narrow.path(6, FILES[0]), good)
    narrow.prune()
    assert [marker.step for marker in narrow.complete_ones()] == [6]


def test_pruning_keeps_the_newest_and_what_is_newer_than_them(place: Callable[[], tuple[str, Path]]) -> None:
    uri, scratch = place()
    store = Store(uri)
    wide, catalog = Catalog(store, make_run(keep=5)), Catalog(store, make_run())
    store.put(catalog.path(1, FILES[0]), b"of a save that was cut")
    catalog.prune()
    assert len(store.sizes()) == 1
    for step in (2, 4, 6):
        save(wide, step, scratch)
    for step in (3, 7):
        store.put(catalog.path(step, FILES[0]), b"of a save that was cut")
    catalog.prune()
    assert {path.split("/")[-2] for path in store.sizes()} == {"step-4", "step-6", "step-7"}


def test_an_adapter_that_is_called_like_a_step(place: Callable[[], tuple[str, Path]]) -> None:
    uri, scratch = place()
    catalog = Catalog(Store(uri), make_run(keep=1).model_copy(update={"name": "step-5"}))
    for step in (2, 4):
        save(catalog, step, scratch)
    assert [marker.step for marker in catalog.complete_ones()] == [4]
    assert {path.split("/")[-2] for path in Store(uri).sizes()} == {"step-4"}


def test_an_expiry_is_beside_what_is_complete_and_goes_with_it(place: Callable[[], tuple[str, Path]]) -> None:
    uri, scratch = place()
    store = Store(uri)
    catalog = Catalog(store, make_run())
    expiry = ExpiryMarker(run="tiny", expires_at=datetime.now(UTC), retain_hours=1)
    assert catalog.expire(expiry) == 0
    for step in (2, 4):
        save(catalog, step, scratch)
    store.put(catalog.path(6, FILES[0]), b"of a save that was cut")
    assert catalog.expire(expiry) == 2
    assert [marker.step for marker in catalog.complete_ones()] == [4, 2], "they count all the same"
    found = [path for path in store.sizes() if path.endswith("EXPIRES.json")]
    assert [path.split("/")[-2] for path in found] == ["step-2", "step-4"]
    save(catalog, 8, scratch)
    assert not any("step-2/" in path for path in store.sizes()), "pruned with all that it had"
    catalog.unexpire()
    assert not any(path.endswith("EXPIRES.json") for path in store.sizes())
    catalog.expire(expiry)
    catalog.delete_all()
    assert store.sizes() == {}


@pytest.mark.parametrize(("field", "changes"), [("globalBatchSize", {"globalBatchSize": 16}), ("seed", {"seed": 4})])
def test_a_checkpoint_of_another_run_is_refused(
    field: str, changes: dict[str, int], place: Callable[[], tuple[str, Path]]
) -> None:
    uri, scratch = place()
    save(Catalog(Store(uri), make_run()), 2, scratch)
    catalog = Catalog(Store(uri), make_run(**changes))
    (marker,) = catalog.complete_ones()
    with pytest.raises(BadSpecError, match=rf"COMPLETE.json: .*training.{field} \d+, this run has"):
        catalog.check_same_run(marker)
    document = json.loads(Store(uri).get(catalog.path(2, "COMPLETE.json")))
    del document["seed"]  # as older trainers wrote it
    document["globalBatchSize"] = catalog._run.training.global_batch_size
    catalog.check_same_run(CompleteMarker.model_validate(document))

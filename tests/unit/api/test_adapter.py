"""The layout of the store: names that are read back as they were written, and a digest that never changes."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_api import adapter
from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, StoredFile

CONFIG = StoredFile(path=ADAPTER_CONFIG, size=612, sha256="a" * 64)
WEIGHTS = StoredFile(path=ADAPTER_WEIGHTS, size=4_900_000, sha256="b" * 64)
README = StoredFile(path="README.md", size=1, sha256="c" * 64)
GOLDEN = "sha256:821ef14b40b87bef8c91795095628710ccda0992b969fe1d86826714490cfce7"


def test_the_digest_is_that_of_the_canonical_json() -> None:
    """Written out, so that another language can compute it; published adapters depend on every byte of it."""
    canonical = (
        '[{"path":"adapter_config.json","sha256":"' + "a" * 64 + '","size":612},'
        '{"path":"adapter_model.safetensors","sha256":"' + "b" * 64 + '","size":4900000}]'
    )
    assert adapter.compute_digest([CONFIG, WEIGHTS]) == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    assert adapter.compute_digest([CONFIG, WEIGHTS]) == GOLDEN


def test_order_and_files_for_people_do_not_change_the_digest() -> None:
    assert adapter.compute_digest([README, WEIGHTS, CONFIG]) == GOLDEN


def test_one_other_byte_changes_the_digest() -> None:
    other = WEIGHTS.model_copy(update={"sha256": "b" * 63 + "c"})
    assert adapter.compute_digest([CONFIG, other]) != GOLDEN


@pytest.mark.parametrize("files", [[], [CONFIG], [WEIGHTS, README], [CONFIG, WEIGHTS, WEIGHTS]])
def test_half_an_adapter_has_no_digest(files: list[StoredFile]) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json, adapter_model\.safetensors once"):
        adapter.compute_digest(files)


@pytest.mark.parametrize("path", ["a", "a/b.json", "step-1/.metadata", "__0_0.distcp", "a..b/c-d_e.f"])
def test_a_path_below_the_directory_is_taken(path: str) -> None:
    assert StoredFile(path=path, size=0, sha256="0" * 64).path == path


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../b", "a/..", ".", "./a", "a//b", "a/", "a b", "a\\b", "a\nb", "a\n", "-a"]
)
def test_a_path_that_may_lead_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        StoredFile(path=path, size=0, sha256="0" * 64)


def test_the_layout() -> None:
    assert adapter.adapter_prefix("team", "support") == "team/support"
    assert adapter.digest_directory("sha256:" + "0" * 64) == "sha256-" + "0" * 64
    assert adapter.version_path(3) == "versions/v3.json"
    assert adapter.checkpoints_directory("uid") == "checkpoints/uid"
    assert adapter.step_directory(40) == "step-40"


@given(st.integers(1, 10**9))
def test_names_are_read_back_as_written(number: int) -> None:
    assert adapter.parse_version_path(f"team/support/{adapter.version_path(number)}") == number
    assert adapter.parse_checkpoint_step(f"{adapter.step_directory(number)}/rank-0.pt") == number


VERSION_PATHS = {
    "versions/v1.json": 1,
    "a/versions/v12.json": 12,
    "versions/v0.json": None,
    "versions/v01.json": None,
    "versions/v1.json.tmp": None,
    "versions/v1.json\n": None,
    "versions/v.json": None,
    "oldversions/v1.json": None,
    "v1.json": None,
    "versions/v" + "9" * 5000 + ".json": None,
}


@pytest.mark.parametrize("path", VERSION_PATHS, ids=lambda path: path[:24])
def test_other_names_are_no_versions(path: str) -> None:
    assert adapter.parse_version_path(path) == VERSION_PATHS[path]


CHECKPOINT_PATHS = {
    "step-40": 40,
    "step-40/COMPLETE.json": 40,
    "step-0/x": 0,
    "checkpoints/u/step-40": None,
    "step-40x": None,
    "astep-40": None,
    "step-": None,
    "probe": None,
}


@pytest.mark.parametrize("path", CHECKPOINT_PATHS)
def test_other_names_are_no_checkpoints(path: str) -> None:
    assert adapter.parse_checkpoint_step(path) == CHECKPOINT_PATHS[path]


@pytest.mark.parametrize(
    ("rank", "want"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (256, 256), (257, 320), (320, 320), (512, 512)]
)
def test_serving_takes_the_smallest_rank_that_fits(rank: int, want: int) -> None:
    assert adapter.serving_max_lora_rank(rank) == want


@pytest.mark.parametrize(("rank", "words"), [(513, "larger than 512"), (0, "smaller than 1")])
def test_a_rank_out_of_range_is_refused(rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapter.serving_max_lora_rank(rank)

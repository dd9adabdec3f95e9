"""Headers of weights that lie: refused by name, in little memory, before the model's values are looked at."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_trainer.checkpointfiles import ADAPTER_STATE, LOOP_STATE, TRAINER_STATE, find_odd_state
from lora_trainer.damage import MAX_PROBLEM, find_damage, read_file_header
from lora_trainer.errors import ModelNotFoundError, classify
from lora_trainer.headers import INDEX_FILE, LENGTH_BYTES, MAX_HEADER, header_length, parse_header
from lora_trainer.modelfiles import ModelFiles, SourcePin, read_headers
from lora_trainer.preflight import preflight
from lora_trainer.sources import fetch_model
from tests.trainer.runs import build_run

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
MIB = 2**20
PIN = SourcePin(uri="s3://b/m", files=1, size_bytes=1)


def pack(header: bytes, values: int = 16) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(values)


def entry(**changes: Any) -> bytes:
    return pack(json.dumps({"w": {**GOOD, **changes}}).encode())


LIES: dict[str, bytes] = {
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 2^64 - 1 bytes": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "fewer than eight bytes": b"\x01",
    "no bytes": b"",
    "values behind the end": entry(shape=[4, 4], data_offsets=[0, 64]),
    "fewer values than the file has": pack(json.dumps({"w": GOOD}).encode(), 32),
    "a tensor that ends before it begins": entry(data_offsets=[16, 0]),
    "a tensor before the file": entry(data_offsets=[-16, 0]),
    "two that overlap": pack(json.dumps({"w": GOOD, "v": {**GOOD, "data_offsets": [8, 24]}}).encode(), 24),
    "two at one place": pack(json.dumps({"w": GOOD, "v": GOOD}).encode()),
    "a gap between two": pack(json.dumps({"w": GOOD, "v": {**GOOD, "data_offsets": [24, 40]}}).encode(), 40),
    "values that begin too late": pack(json.dumps({"w": {**GOOD, "data_offsets": [8, 24]}}).encode(), 24),
    "two negative dimensions": entry(shape=[-2, -2]),
    "a product beyond 64 bits": entry(shape=[2**40, 2**40], data_offsets=[0, 16]),
    "a product of zero and beyond 64 bits": entry(shape=[2**63, 2**63, 0], data_offsets=[0, 16]),
    "a dimension of 5000 digits": pack(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "a million dimensions": pack(json.dumps({"w": {**GOOD, "shape": [1] * 10**6}}).encode()),
    "a dimension that is no number": entry(shape=[2.5, 2]),
    "a dimension that is a word": entry(shape=["2", "2"]),
    "three offsets": entry(data_offsets=[0, 16, 32]),
    "one name twice": pack(b'{"w":%s,"w":%s}' % (json.dumps(GOOD).encode(), json.dumps(GOOD).encode())),
    "one field twice": pack(b'{"w":{"dtype":"I32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "metadata nested beyond the stack": pack(b'{"__metadata__":' + b'{"a":' * 100_000 + b"}" * 100_001),
    "no object": pack(b"[]"),
    "an entry that is no object": pack(b'{"w":3}'),
    "not UTF-8": pack(b'{"\xff":1}'),
    "UTF-16": pack(json.dumps({"w": GOOD}).encode("utf-16-le")),
    "a mark of the byte order": pack(b"\xef\xbb\xbf" + json.dumps({"w": GOOD}).encode()),
    "a name of half a surrogate pair": pack(json.dumps({"\ud800": GOOD}).encode()),
    "a name of a million characters": pack(json.dumps({"w" * 10**6: {**GOOD, "shape": [3]}}).encode()),
    "a million characters in one place": pack(json.dumps({"w": GOOD, "v" * 10**6: GOOD}).encode()),
    "a number that JSON does not have": pack(json.dumps({"w": {**GOOD, "x": float("nan")}}).encode()),
    "metadata that are no object": pack(json.dumps({"__metadata__": ["pt"], "w": GOOD}).encode()),
    "metadata that are no texts": pack(json.dumps({"__metadata__": {"format": 1}, "w": GOOD}).encode()),
    "a type that is an object": entry(dtype={"F32": 1}),
    "a type of a million characters": entry(dtype="F" * 10**6),
    "fewer bytes of 8-bit values": entry(dtype="F8_E4M3", shape=[1000, 1000]),
    "fewer bytes of unsigned values": entry(dtype="U32", shape=[1000, 1000]),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused_by_the_name_of_its_file(case: str, tmp_path: Path) -> None:
    """Attack: who writes the base model gives it a header that lies about sizes."""
    file = tmp_path / "w.safetensors"
    file.write_bytes(LIES[case])
    with pytest.raises(ModelNotFoundError, match=r"^w\.safetensors: ") as caught:
        read_file_header(file)
    assert len(str(caught.value)) < 1000
    if "twice" not in case:  # there safetensors takes the last one
        with pytest.raises(SafetensorError) as refused:
            load_tensors(LIES[case])
        assert classify(refused.value) == FailureClass.MODEL_NOT_FOUND, "without a preflight it ends alike"


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(0, 7),
        "c": torch.zeros(()),
        "d": torch.zeros(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = read_file_header(tmp_path / "w.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {k: tuple(v.shape) for k, v in tensors.items()}


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "w", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["w", "v", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@given(
    header=HEADERS
    | st.dictionaries(
        st.sampled_from("wv"), st.fixed_dictionaries({"dtype": HEADERS, "shape": HEADERS, "data_offsets": HEADERS})
    ),
    values=st.integers(0, 64),
)
def test_no_header_ends_in_a_stack_trace(header: Any, values: int) -> None:
    """Attack: who writes the base model tries all kinds of headers."""
    content = pack(json.dumps(header).encode(), values)
    try:
        length = header_length(content, "w", len(content))
        parse_header(content[LENGTH_BYTES : LENGTH_BYTES + length], "w", len(content))
    except ModelNotFoundError:
        return


def test_a_header_of_90_mb_is_not_read(tmp_path: Path) -> None:
    """Attack: who writes the base model gives each of its files a header of 90 MB, which takes gigabytes once read."""
    length = 90 * MIB
    names = [f"model-{number}.safetensors" for number in range(8)]
    asked: list[int] = []

    def read(name: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return (length.to_bytes(8, "little") + bytes(end))[start:end]

    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    files = ModelFiles(tmp_path, PIN, dict.fromkeys(names, 2 * length), read)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelNotFoundError, match=rf"has a header of {length} bytes, and at most {MAX_HEADER} are read"):
        read_headers(files)
    assert sum(asked) < 8 * MIB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 50


def test_more_tensors_than_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: who writes the base model names a thousand files in its index, each with a long header."""
    header = pack(
        json.dumps({f"w{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(500)}).encode(), 0
    )
    names = [f"model-{number:04}.safetensors" for number in range(1000)]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    asked: list[str] = []

    def read(name: str, start: int, end: int) -> bytes:
        asked.append(name)
        return header[start:end]

    monkeypatch.setattr("lora_trainer.modelfiles.MAX_TENSORS", 10_000)
    with pytest.raises(ModelNotFoundError, match="its first 24 files have 12000 tensors: no model has"):
        read_headers(ModelFiles(tmp_path, PIN, dict.fromkeys(names, len(header)), read))
    assert len(asked) == 24


OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "a/../../secret.safetensors",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "a\0b",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    """Attack: who writes the base model has its index name a file outside of it, which transformers would open."""
    (tmp_path / "secret.safetensors").write_bytes(pack(json.dumps({"w": GOOD}).encode()))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model-1.safetensors").write_bytes(pack(json.dumps({"w": GOOD}).encode()))
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "w": name}}))
    run = build_run(model, tmp_path, tmp_path, {})
    with pytest.raises(
        ModelNotFoundError, match=r"model\.safetensors\.index\.json: .* is not the name of a file beside"
    ):
        fetch_model(run.base_model, tmp_path / "fetched")


def test_preflight_says_what_is_wrong_with_a_header(
    model: Path, make_run: Callable[..., RunSpec], tmp_path: Path
) -> None:
    """Attack: who writes the base model has a header lie about the bytes of one tensor."""
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "model.safetensors").write_bytes(LIES["two that overlap"])
    run = make_run(baseModel={"uri": f"file://{tmp_path}/model"})
    result = preflight(json.dumps(run.to_wire()), "run.json", tmp_path / "work", 24)
    [problem] = [one for one in result.problems if "safetensors" in one.message]
    assert problem.failure_class == FailureClass.MODEL_NOT_FOUND
    assert "model.safetensors: w: its bytes" in problem.message or "model.safetensors: v: its bytes" in problem.message


SHAPES = {"lora_A": (2, 2), "lora_B": (4, 2)}


def checkpoint(directory: Path) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, directory / ADAPTER_STATE)
    save_file({"lora_A.exp_avg": torch.zeros(2, 2)}, directory / "optimizer.safetensors")
    (directory / LOOP_STATE).write_text("{}")
    return directory


def test_a_checkpoint_as_it_was_saved_is_sound(tmp_path: Path) -> None:
    assert find_damage(checkpoint(tmp_path), ADAPTER_STATE, SHAPES) is None


ALTERED: dict[str, tuple[str, bytes, str]] = {
    **{
        f"the adapter has {case}": (ADAPTER_STATE, LIES[case], f"{ADAPTER_STATE}: ")
        for case in ("a header of 2^63 bytes", "two that overlap", "values behind the end")
    },
    "the optimizer's state lies": ("optimizer.safetensors", LIES["two at one place"], "optimizer.safetensors: "),
    "another adapter": (ADAPTER_STATE, entry(), "lora_A is missing"),
    "a state that is no JSON": (TRAINER_STATE, b"{", "is not JSON"),
    "a state nested beyond the stack": (TRAINER_STATE, b'{"a":' * 100_000, "is not JSON"),
    "a state that is a list": (LOOP_STATE, b"[]", "is no JSON object"),
    "a tensor whose name goes to all ranks": (ADAPTER_STATE, pack(json.dumps({"a" * 10**7: GOOD}).encode()), "aaa"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_a_checkpoint_that_was_altered_is_told(case: str, tmp_path: Path) -> None:
    """Attack: who can write to the store alters a checkpoint, and its COMPLETE.json with it."""
    name, content, words = ALTERED[case]
    (checkpoint(tmp_path) / name).write_bytes(content)
    problem = find_damage(tmp_path, ADAPTER_STATE, SHAPES)
    assert problem is not None
    assert words in problem
    assert len(problem) <= MAX_PROBLEM


def test_a_checkpoint_without_a_file_is_told(tmp_path: Path) -> None:
    """Attack: who can write to the store leaves the name of a file out of COMPLETE.json."""
    found = find_damage(checkpoint(tmp_path), ADAPTER_STATE, SHAPES, [ADAPTER_STATE, TRAINER_STATE])
    assert found == f"{TRAINER_STATE}: missing"


SAVED_LOOP = {
    "before": {"loss": None, "samples": []},
    "skipped": [0, 0],
    "scheduler": {"last_epoch": 4},
}
ODD_STATES: dict[str, tuple[Any, Any]] = {
    "nothing": ({}, {"global_step": 4}),
    "words for numbers": (SAVED_LOOP | {"skipped": ["a", 0]}, {"global_step": 4}),
    "no list of samples": (SAVED_LOOP | {"before": {"samples": 3}}, {"global_step": 4}),
    "no schedule": (SAVED_LOOP | {"scheduler": 3}, {"global_step": 4}),
    "no place in the schedule": (SAVED_LOOP | {"scheduler": {"last_epoch": "x"}}, {"global_step": 4}),
    "a place at no end": (SAVED_LOOP | {"scheduler": {"last_epoch": float("inf")}}, {"global_step": 4}),
    "an origin that is no text": (SAVED_LOOP | {"resumedFrom": 3}, {"global_step": 4}),
    "an unknown field": (SAVED_LOOP, {"global_step": 4, "x": 1}),
    "another step": (SAVED_LOOP, {"global_step": 2}),
}


@pytest.mark.parametrize("case", ODD_STATES)
def test_a_state_that_was_not_saved_is_told(case: str, tmp_path: Path) -> None:
    """Attack: who can write to the store puts other JSON where the state of the loop was."""
    for name, content in zip((LOOP_STATE, TRAINER_STATE), ODD_STATES[case], strict=True):
        (tmp_path / name).write_text(json.dumps(content))
    assert find_odd_state(tmp_path, 4) is not None
    (tmp_path / LOOP_STATE).write_text(json.dumps(SAVED_LOOP))
    (tmp_path / TRAINER_STATE).write_text(json.dumps({"global_step": 4}))
    assert find_odd_state(tmp_path, 4) is None


def test_a_huge_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    """Attack: who can write to the store puts 100 GB where the state of a small adapter was."""
    with (checkpoint(tmp_path) / "optimizer.safetensors").open("ab") as file:
        file.truncate(100 * 2**30)
    assert "has 107374182400 bytes, and the adapter 12 weights" in (find_damage(tmp_path, ADAPTER_STATE, SHAPES) or "")
    checkpoint(tmp_path)
    save_file({"lora_A": torch.zeros(2, 2), "lora_B": torch.zeros(4, 3)}, tmp_path / ADAPTER_STATE)
    assert "has the shape [4, 3], and this run's [4, 2]" in (find_damage(tmp_path, ADAPTER_STATE, SHAPES) or "")

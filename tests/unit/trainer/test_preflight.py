"""Parts of preflight: headers of safetensors files, what is read of a broken document, the class of the whole."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_api.failures import FAILURE_RULES, FailureClass
from lora_api.preflight import PreflightResult, Problem
from lora_trainer.errors import ModelNotFoundError
from lora_trainer.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    TensorInfo,
    check_index,
    choose_shards,
    count_by_type,
    count_weights,
    header_length,
    merge,
    parse_header,
)
from lora_trainer.modelfiles import open_model, read_headers
from lora_trainer.modelshape import read_shape
from lora_trainer.preflight import Findings, read_leniently

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def entry(dtype: str = "BF16", shape: tuple[int, ...] = (2, 3), start: int = 0, end: int = 12) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def parse(tensors: object, size: int | None = None) -> Header:
    text = json.dumps(tensors).encode()
    return parse_header(text, "x.safetensors", 8 + len(text) + 12 if size is None else size)


def test_a_header_tells_types_and_shapes() -> None:
    found = parse({"__metadata__": {"format": "pt"}, "a.weight": entry()})
    assert found == {"a.weight": TensorInfo("BF16", (2, 3))}
    assert count_by_type({**found, "b": TensorInfo("F32", (7,))}) == {"F32": 7, "BF16": 6}


BAD_HEADERS: list[tuple[str, object, str]] = [
    ("no object", [], "header is broken"),
    ("no dtype", {"a": {"shape": [1], "data_offsets": [0, 2]}}, "header is broken"),
    ("no offsets", {"a": {"dtype": "BF16", "shape": [1]}}, "header is broken"),
    ("half an offset", {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0]}}, "header is broken"),
    ("a shape that is none", {"a": {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 2]}}, "header is broken"),
    ("bytes that are not the shape's", {"a": entry(shape=(2, 4))}, r"a: 12 bytes are not BF16 \[2, 4\]"),
    ("values that are not there", {"a": entry(), "b": entry(start=12, end=24)}, "upload it again"),
]


@pytest.mark.parametrize(("tensors", "words"), [row[1:] for row in BAD_HEADERS], ids=[row[0] for row in BAD_HEADERS])
def test_a_broken_header_is_told(tensors: object, words: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"x.safetensors: .*{words}"):
        parse(tensors)


@given(st.binary(max_size=64), st.integers(0, 80))
def test_no_bytes_end_in_another_error(start: bytes, size: int) -> None:
    try:
        length = header_length(start, "x", size)
        parse_header(start[8 : 8 + length], "x", size)
    except ModelNotFoundError:
        pass


INDEX = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
SHARDS: list[tuple[str, object, list[str], list[str] | str]] = [
    ("one file", None, [SINGLE_FILE, "consolidated.safetensors"], [SINGLE_FILE]),
    (
        "shards of an index",
        INDEX,
        ["1.safetensors", "2.safetensors", "3.safetensors"],
        ["1.safetensors", "2.safetensors"],
    ),
    ("one file wins over an index", INDEX, [SINGLE_FILE, "1.safetensors"], [SINGLE_FILE]),
    ("nothing", None, ["consolidated.safetensors"], f"neither {SINGLE_FILE} nor {INDEX_FILE}"),
    ("a missing shard", INDEX, ["1.safetensors"], "names 2 files, and 1 are not there: 2.safetensors"),
    ("an index without a map", {}, ["1.safetensors"], "weight_map must be an object"),
    ("an index of numbers", {"weight_map": {"a": 1}}, ["1.safetensors"], "weight_map must be an object"),
    ("an index that is a list", [], ["1.safetensors"], "weight_map must be an object"),
]


@pytest.mark.parametrize(("index", "present", "wanted"), [row[1:] for row in SHARDS], ids=[row[0] for row in SHARDS])
def test_weights_are_in_one_file_or_in_those_of_the_index(
    index: object, present: list[str], wanted: list[str] | str
) -> None:
    if isinstance(wanted, str):
        with pytest.raises(ModelNotFoundError, match=wanted):
            choose_shards(index, present)
    else:
        assert choose_shards(index, present) == wanted


def test_a_tensor_that_its_shard_lacks_is_told() -> None:
    headers = {"1.safetensors": {"a": TensorInfo("F32", (1,))}, "2.safetensors": {}}
    with pytest.raises(ModelNotFoundError, match="1 tensors are not in their files, such as b"):
        check_index(INDEX, headers)
    headers["2.safetensors"] = {"b": TensorInfo("F32", (1,))}
    check_index(INDEX, headers)
    assert set(merge(headers)) == {"a", "b"}


def test_weights_are_counted_as_they_are_loaded() -> None:
    shape = read_shape(
        {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "vocab_size": 10,
            "tie_word_embeddings": True,
        }
    )
    layer = {
        f"model.layers.0.{one.name}.weight": TensorInfo("BF16", (one.outputs, one.inputs)) for one in shape.linears
    }
    rest = {
        "model.embed_tokens.weight": TensorInfo("BF16", (10, 8)),
        "lm_head.weight": TensorInfo("BF16", (10, 8)),
        "model.norm.weight": TensorInfo("BF16", (8,)),
        "model.layers.0.input_layernorm.weight": TensorInfo("BF16", (8,)),
        "model.layers.0.post_attention_layernorm.weight": TensorInfo("BF16", (8,)),
    }
    assert count_weights({**layer, **rest}, shape) == shape.weights


def run_document(**changes: Any) -> dict[str, Any]:
    return {
        "namespace": "a",
        "name": "b",
        "uid": "c",
        "baseModel": {"uri": "file:///model"},
        "dataset": {"train": {"uri": "file:///data"}},
        "training": {"maxSteps": 1},
        "publish": {"store": "file:///store"},
        **changes,
    }


DOCUMENTS: list[tuple[str, str, set[str], list[str], bool]] = [
    ("all right", json.dumps(run_document()), set(), [], True),
    (
        "every wrong field is named",
        json.dumps(run_document(lora={"r": 0, "alfa": 1}, training={"maxSteps": 0}, more=1)),
        {"lora", "training", "more"},
        ["run.json: lora.r: ", "lora.alfa: ", "training.maxSteps: ", "more: "],
        True,
    ),
    (
        "no model",
        json.dumps({**run_document(), "baseModel": {}}),
        {"baseModel"},
        ["baseModel.uri: Field required"],
        True,
    ),
    ("no sections", "{}", set(run_document()) - {"x"}, ["namespace: ", "training: "], True),
    ("no object", "[]", set(), ["run.json: "], False),
    ("no JSON", "{", set(), ["run.json: "], False),
]


@pytest.mark.parametrize(
    ("text", "broken", "words", "usable"), [row[1:] for row in DOCUMENTS], ids=[row[0] for row in DOCUMENTS]
)
def test_what_is_right_of_a_document_is_read(text: str, broken: set[str], words: list[str], usable: bool) -> None:
    findings = Findings()
    run, found = read_leniently(text, "run.json", findings)
    assert found == broken
    assert (run is not None) == usable
    messages = [problem.message for problem in findings.problems]
    assert {problem.failure_class for problem in findings.problems} <= {FailureClass.BAD_SPEC}
    assert all(any(word in message for message in messages) for word in words), messages
    assert bool(messages) == bool(words)


def result(*classes: FailureClass) -> PreflightResult:
    problems = [Problem(failure_class=one, message="m") for one in classes]
    return PreflightResult(outcome="failed" if problems else "passed", problems=problems, at=NOW)


def test_what_no_retry_can_help_decides_the_class_of_the_whole() -> None:
    assert result().failure_class is None
    assert result(FailureClass.STORE_UNAVAILABLE).failure_class == FailureClass.STORE_UNAVAILABLE
    both = result(FailureClass.STORE_UNAVAILABLE, FailureClass.BAD_DATA, FailureClass.BAD_SPEC)
    assert both.failure_class == FailureClass.BAD_SPEC
    for rule in FAILURE_RULES:
        assert result(rule.failure_class).failure_class == rule.failure_class


def test_the_result_comes_back_from_json() -> None:
    some = result(FailureClass.BAD_DATA)
    assert PreflightResult.model_validate_json(json.dumps(some.to_wire())) == some
    assert some.to_wire()["problems"] == [{"class": "BadData", "message": "m"}]


def test_headers_are_read_without_torch() -> None:
    code = (
        "import sys, lora_trainer.preflight, lora_trainer.preflightcli; "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_header_that_is_longer_than_the_first_piece_is_read_on(tmp_path: Path) -> None:
    from lora_api.sources import BaseModelSource

    names = {
        f"tensor-{'x' * 100}-{number}": entry(start=2 * number, end=2 * number + 2, shape=(1,))
        for number in range(3000)
    }
    text = json.dumps(names).encode()
    assert len(text) > 256 * 1024
    (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(6000))
    (tmp_path / "config.json").write_text("{}")
    headers = read_headers(open_model(BaseModelSource(uri=f"file://{tmp_path}"), tmp_path / "none"))
    assert len(headers[SINGLE_FILE]) == 3000

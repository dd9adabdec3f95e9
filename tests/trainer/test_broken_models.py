"""Files of a model that are not as they should be: preflight names the file, and nothing ends in a stack trace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_api.failures import FailureClass
from lora_api.preflight import PreflightResult
from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.model import load_skeleton, load_tokenizer
from lora_trainer.preflight import preflight
from tests.support.families import SIZES, build_config
from tests.support.tiny import make_model

SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FAMILIES = ("llama-3", "gemma-2", "gemma-3-vision", "mixtral", "phi-2", "qwen-2-moe")
CONFIGS: dict[str, dict[str, Any]] = {name: json.loads(build_config(name).to_json_string()) for name in FAMILIES}
VALUES = (
    st.sampled_from([None, "x", "", 0, -1, 1.5, [], {}, [None], {"a": None}, 10**30, 2**31 - 1])
    | st.booleans()
    | st.integers(-2, 300)
    | st.text(max_size=5)
)
BROKEN = [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"a":' * 20_000]
"""What no file of a model is. The last one is nested too deep for a parser that calls itself."""

Check = Callable[[], PreflightResult]


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(model, tmp_path / "copied"))


@pytest.fixture
def check(copied: Path, make_run: Callable[..., RunSpec], tmp_path: Path) -> Check:
    """Preflight of a run of the copied model, in this process."""
    document = json.dumps(make_run(baseModel={"uri": f"file://{copied}"}).to_wire())
    return lambda: preflight(document, "run.json", tmp_path / "preflight", 24)


def classes(result: PreflightResult) -> set[FailureClass]:
    return {problem.failure_class for problem in result.problems}


@SETTINGS
@given(data=st.data())
def test_no_value_in_the_config_ends_in_a_stack_trace(data: st.DataObject, check: Check, copied: Path) -> None:
    config = CONFIGS[data.draw(st.sampled_from(FAMILIES))]
    changes = data.draw(st.dictionaries(st.sampled_from(sorted({*config, *SIZES, "head_dim"})), VALUES, max_size=2))
    nested = config.get("text_config")
    spoiled = (
        {**config, "text_config": {**nested, **changes}} if nested and data.draw(st.booleans()) else config | changes
    )
    (copied / "config.json").write_text(json.dumps(spoiled))
    assert classes(check()) <= {FailureClass.BAD_SPEC}


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", "x"), ("use_cache", 0), ("tie_word_embeddings", None), ("num_hidden_layers", 10**9)],
)
def test_a_value_in_the_config_is_refused_by_its_key(key: str, value: Any, check: Check, copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({**json.loads((copied / "config.json").read_text()), key: value}))
    result = check()
    assert classes(result) == {FailureClass.BAD_SPEC}
    assert all("config.json" in problem.message and key in problem.message for problem in result.problems)
    with pytest.raises(BadSpecError, match=key):
        load_skeleton(copied)


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:8]))
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_object_is_named(name: str, content: bytes, check: Check, copied: Path) -> None:
    (copied / name).write_bytes(content)
    result = check()
    assert classes(result) == {FailureClass.BAD_SPEC}, result.problems
    assert all(name in problem.message for problem in result.problems), result.problems


def test_a_tokenizer_without_its_vocabulary_is_refused_by_its_file(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(BadSpecError, match=r"baseModel: .*tokenizer\.json"):
        load_tokenizer(directory)

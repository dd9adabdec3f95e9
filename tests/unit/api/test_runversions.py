"""What a trainer of an earlier release is given."""

import pytest

from lora_api import RUN_VERSION, LoRAFineTune, build_run_spec
from lora_api.mistakes import field_paths
from lora_api.run import RunSpec
from lora_api.runversions import FIELDS_OF_1, to_version

KEY = "0f" * 32
RUN = LoRAFineTune.model_validate(
    {
        "metadata": {"name": "support", "namespace": "team", "uid": "u-1"},
        "spec": {
            "baseModel": {"uri": "s3://models/m"},
            "dataset": {"train": {"uri": "s3://data/t.jsonl"}, "columns": {"prompt": "question"}},
            "lora": {"rankPattern": {"down_proj": 8}},
            "training": {"maxSteps": 18},
            "publish": {"store": "s3://adapters"},
        },
        "status": {"pins": {"train": {"uri": "s3://data/t.jsonl", "files": 1, "sizeBytes": 2, "etag": "of later"}}},
    }
)


def test_a_trainer_of_today_gets_all_there_is() -> None:
    document = to_version(build_run_spec(RUN, 2, KEY), RUN_VERSION)
    assert document.document == build_run_spec(RUN, 2, KEY).to_wire()
    assert (document.document["version"], document.document["controlKey"]) == (2, KEY)
    assert document.left_out == ()


def test_an_older_trainer_gets_what_it_knows_and_nothing_else() -> None:
    whole = build_run_spec(RUN, 2).to_wire()
    document = to_version(build_run_spec(RUN, 2, KEY), 1)
    assert "controlKey" not in document.document
    assert document.document["version"] == 1
    assert document.document["dataset"]["columns"] == {"prompt": "question"}, "keys of the user's stay"
    assert document.document["lora"]["rankPattern"] == {"down_proj": 8}
    pins = {"train": {"uri": "s3://data/t.jsonl", "files": 1, "sizeBytes": 2}}
    assert document.document == {**whole, "version": 1, "pins": pins}
    assert document.left_out == ("pins.train.etag",), "the key is nobody's wish, and what is left out else is named"


def test_an_older_trainer_is_not_asked_for_the_base_as_it_is_served() -> None:
    publish = {"store": "s3://adapters", "servedDtype": "float32", "gate": {"maxEvalLoss": 1.0, "base": "served"}}
    asked = LoRAFineTune.model_validate(RUN.to_wire() | {"spec": RUN.spec.to_wire() | {"publish": publish}})
    document = to_version(build_run_spec(asked, 1), 1)
    assert document.document["publish"]["gate"] == {"maxEvalLoss": 1.0}
    assert set(document.left_out) == {"publish.servedDtype", "publish.gate.base", "pins.train.etag"}
    assert to_version(build_run_spec(RUN, 1, KEY), 1).left_out == ("pins.train.etag",), (
        "who does not ask misses nothing"
    )


def test_a_document_without_anything_new_is_one_that_every_trainer_reads() -> None:
    plain = RUN.model_copy(update={"status": RUN.status.model_copy(update={"pins": None})})
    assert to_version(build_run_spec(plain, 1), RUN_VERSION).document["version"] == 1


def test_a_newer_trainer_is_given_what_this_operator_knows() -> None:
    assert to_version(build_run_spec(RUN, 1, KEY), 9).document["version"] == RUN_VERSION


RESUMED = {"uri": "s3://adapters/team/support/checkpoints/u-0/step-9"}


def test_an_older_trainer_is_given_what_nobody_may_go_without_so_that_it_refuses_it() -> None:
    checkpoint = {"keep": 1, "retainHours": 5, "resumeFrom": RESUMED}
    asked = LoRAFineTune.model_validate(RUN.to_wire() | {"spec": RUN.spec.to_wire() | {"checkpoint": checkpoint}})
    document = to_version(build_run_spec(asked, 1), 1)
    assert document.document["checkpoint"] == {"keep": 1, "resumeFrom": RESUMED}
    assert document.document["version"] == 1
    assert set(document.left_out) == {"checkpoint.retainHours", "pins.train.etag"}
    assert to_version(build_run_spec(asked, 1), RUN_VERSION).document["checkpoint"] == checkpoint


NEW_IN_2 = {
    "controlKey",
    "publish.gate.base",
    "publish.servedDtype",
    "checkpoint.retainHours",
    "checkpoint.resumeFrom",
    "checkpoint.resumeFrom.name",
    "checkpoint.resumeFrom.uri",
}


def test_a_field_that_comes_or_goes_is_a_new_version() -> None:
    """Trainers tell a newer document, of which they leave out what is new, from a typing mistake by its version."""
    paths = {f"{at}.{name}".lstrip(".") for at, names in FIELDS_OF_1.items() for name in names}
    assert paths <= set(field_paths(RunSpec)), "a field that is gone: a trainer of version 1 would still ask for it"
    added = set(field_paths(RunSpec)) - paths
    assert added == NEW_IN_2, "of a release that is out: raise RUN_VERSION, and list here what the new version has"
    assert RUN_VERSION == 2


@pytest.mark.parametrize("key", ["0f" * 31, "0F" * 32, "zz" * 32])
def test_a_key_is_32_bytes_in_hex(key: str) -> None:
    with pytest.raises(ValueError, match=r"control_?[kK]ey"):
        build_run_spec(RUN, 1, key)

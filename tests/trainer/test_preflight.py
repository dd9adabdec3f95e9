"""Preflight on real directories and a real S3 store: what it pins, plans, refuses, and leaves alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from lora_api.failures import FailureClass
from lora_api.preflight import PreflightResult
from lora_api.run import RunSpec
from lora_trainer.errors import SourceChangedError
from lora_trainer.origin import describe_base
from lora_trainer.pinned import check_pins
from lora_trainer.preflight import preflight
from lora_trainer.preflightcli import last_words
from lora_trainer.settings import Place
from lora_trainer.sources import fetch_sources
from tests.support.families import SIZES, make_family
from tests.support.seaweed import Seaweed
from tests.support.tiny import make_rows, save_tokenizer, write_rows
from tests.unit.trainer.checkpoints import save

Make = Callable[..., RunSpec]
Check = Callable[..., PreflightResult]
BAD_SPEC, BAD_DATA = FailureClass.BAD_SPEC, FailureClass.BAD_DATA


@pytest.fixture
def check(tmp_path: Path, make_run: Make) -> Check:
    """Checks a run in this process; keywords are merged into it, ``edit`` changes its document."""

    def run(gib: float | None = None, edit: dict[str, Any] | None = None, **changes: Any) -> PreflightResult:
        document = {**make_run(**changes).to_wire(), **(edit or {})}
        return preflight(json.dumps(document), "run.json", tmp_path / "preflight", gib)

    return run


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(model, tmp_path / "copied"))


def said(result: PreflightResult) -> list[tuple[FailureClass, str]]:
    return [(problem.failure_class, problem.message) for problem in result.problems]


def test_a_run_that_is_all_right(check: Check, model: Path, tmp_path: Path) -> None:
    result = check(gib=24, training={"microBatchSize": "auto"}, parallelism={"gpusPerNode": 2})
    assert result.outcome == "passed", said(result)
    assert result.warnings == []
    assert result.model is not None
    parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert (result.model.parameters, result.model.parameters_by_type) == (parameters, {"F32": parameters})
    assert result.model.weight_bytes == (model / "model.safetensors").stat().st_size
    assert result.data is not None
    assert (result.data.train_records, result.data.eval_records) == (48, 9)
    plan = result.plan
    assert plan is not None
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.shard_size, plan.total_steps) == (4, 1, 2, 4)
    assert plan.tokens_per_epoch == result.data.tokens > 0
    assert plan.memory is not None
    assert plan.memory.fits is True
    assert sum(plan.memory.parts.values()) == pytest.approx(plan.memory.estimate_gib, abs=0.01)
    assert not any(path.is_file() for path in (tmp_path / "store").rglob("*")), "the probe is gone"
    read_back = PreflightResult.model_validate_json(json.dumps(result.to_wire()))
    assert read_back.model_copy(update={"at": result.at}) == result


def test_pins_follow_content_and_nothing_else(check: Check, copied: Path) -> None:
    def pins() -> list[str | None]:
        found = check(baseModel={"uri": f"file://{copied}"}).pins
        assert found.base_model is not None
        assert found.train is not None
        return [found.base_model.digest, found.train.digest]

    first = pins()
    os.utime(copied / "config.json", (1, 1))
    assert pins() == first
    (copied / "generation_config.json").write_text('{"eos_token_id": 3}')
    changed = pins()
    assert changed[0] != first[0]
    assert changed[1] == first[1]


def test_a_device_that_is_not_known_leaves_the_micro_batch_open(check: Check) -> None:
    for parallelism in ({"gpusPerNode": 1}, {"gpusPerNode": 0}):
        result = check(training={"microBatchSize": "auto"}, parallelism=parallelism)
        assert result.outcome == "passed", said(result)
        assert result.plan is not None
        assert result.plan.micro_batch_size is None
        assert result.plan.memory is not None
        assert result.plan.memory.fits is None


def test_the_device_of_the_run_is_what_is_planned_for(check: Check) -> None:
    device = {"device": {"name": "NVIDIA-L4", "memoryGiB": 22.5}}
    result = check(edit=device, parallelism={"gpusPerNode": 1})
    assert result.plan is not None
    assert result.plan.memory is not None
    assert result.plan.memory.device_gib == 22.5
    result = check(gib=80, edit=device, parallelism={"gpusPerNode": 1})
    assert result.plan is not None
    assert result.plan.memory is not None
    assert result.plan.memory.device_gib == 80, "the command line wins"
    result = check(gib=80, parallelism={"gpusPerNode": 0})
    assert any("gpusPerNode is 0" in warning for warning in result.warnings)


def test_the_checkpoint_that_a_run_goes_on_from_is_looked_at(check: Check, make_run: Make, tmp_path: Path) -> None:
    pin = check().pins.base_model
    assert pin is not None
    save(tmp_path / "store", "tests/old/checkpoints/u", 2, by=make_run(), base_model=describe_base(pin))
    asked: dict[str, Any] = {"checkpoint": {"resumeFrom": {"name": "old"}}}
    result = check(**asked)
    assert result.outcome == "passed", said(result)
    assert result.start == (
        f"goes on from step 2 of file://{tmp_path}/store/tests/old/checkpoints/u/step-2 (checkpoint.resumeFrom)"
    )
    assert last_words(result).message.endswith(
        f"; {result.start}. Warning: checkpoint.resumeFrom: dataset is not what {result.start.split()[6]} was trained "
        "on: the run goes on at step 3 in the order of the new records, and leaves out as many of them as the steps "
        "before would have taken"
    )
    refusals = {
        "this run has lora.r 8": check(**asked, lora={"r": 8}),
        "is of step 2, and this run has 2 steps": check(**asked, training={"maxSteps": 2}),
        "there is no complete checkpoint below": check(checkpoint={"resumeFrom": {"name": "other"}}),
    }
    for words, result in refusals.items():
        assert [one[0] for one in said(result)] == [BAD_SPEC]
        assert words in said(result)[0][1]


def test_what_cannot_fit_is_refused_and_what_was_chosen_is_warned_of(check: Check) -> None:
    auto = check(gib=1.9, training={"microBatchSize": "auto"}, parallelism={"gpusPerNode": 1})
    assert [one[0] for one in said(auto)] == [BAD_SPEC]
    assert "not even 1 x" in said(auto)[0][1]
    chosen = check(gib=1.9, training={"microBatchSize": 8}, parallelism={"gpusPerNode": 1})
    assert chosen.outcome == "passed"
    assert any("do not fit" in warning for warning in chosen.warnings)
    assert chosen.plan is not None
    assert chosen.plan.memory is not None
    assert chosen.plan.memory.fits is False


def test_everything_wrong_is_said_at_once(check: Check, tmp_path: Path, copied: Path) -> None:
    rows: list[Any] = make_rows(5)
    rows[1], rows[3] = {"prompt": "a"}, {"prompt": 1, "completion": "b"}
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:-5])
    (tmp_path / "in-the-way").write_text("a file where the store should be")
    result = check(
        baseModel={"uri": f"file://{copied}"},
        dataset={"train": {"uri": f"file://{bad}"}},
        training={"globalBatchSize": 7},
        publish={"store": f"file://{tmp_path}/in-the-way/store"},
        edit={"lora": {"r": 0, "alpha": 8}},
    )
    found = said(result)
    assert (BAD_SPEC, "run.json: lora.r: Input should be greater than or equal to 1") in found
    assert any("upload it again" in message for kind, message in found if kind == FailureClass.MODEL_NOT_FOUND)
    assert any("2 records are bad" in message and "record 2" in message for kind, message in found if kind == BAD_DATA)
    assert len(found) >= 4, found
    assert result.failure_class == BAD_SPEC
    result = check(training={"globalBatchSize": 7}, lora={"targetModules": ["c_attn"]})
    assert [kind for kind, _ in said(result)] == [BAD_SPEC, BAD_SPEC]
    assert "lora.targetModules: c_attn" in said(result)[0][1]
    assert "training.globalBatchSize is 7" in said(result)[1][1]


UNPLANNED: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "layers that are not linear": ("GPT2", {}, "has no linear layers"),
    "a target that is not there": ("Phi", {"targetModules": ["nonesuch"]}, "nonesuch is no linear layer"),
    "a rank for no target": ("Phi", {"rankPattern": {"up_proj": 2}}, "rankPattern: up_proj is none of"),
    "a rank for no target, of a planned model": ("Llama", {"rankPattern": {"fc1": 2}}, "fc1 is none of"),
    "all of it in order": ("Phi", {"targetModules": ["q_proj", "fc1"]}, None),
}


@pytest.mark.parametrize("case", UNPLANNED)
def test_the_layers_of_a_model_are_looked_at_though_its_memory_is_not_planned(
    case: str, check: Check, tmp_path: Path
) -> None:
    kind, lora, words = UNPLANNED[case]
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    result = check(gib=24, baseModel={"uri": f"file://{tmp_path}/other"}, lora=lora)
    found = said(result)
    assert [kind for kind, _ in found] == ([] if words is None else [BAD_SPEC]), found
    assert words is None or words in found[0][1]
    assert any("memory is not planned" in text for text in result.warnings) == (kind != "Llama")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("nf4", "they get no adapter and are held in NF4"),
        ("int8", "they get no adapter and are not quantized, though quantization.type is int8"),
        ("none", "they get no adapter"),
    ],
)
def test_it_is_said_what_becomes_of_experts(quantization: str, words: str, check: Check, tmp_path: Path) -> None:
    model = make_family("mixtral", tmp_path / "mixture")
    result = check(gib=24, baseModel={"uri": f"file://{model}"}, quantization={"type": quantization})
    assert not said(result)
    (warning,) = [text for text in result.warnings if "experts" in text]
    experts = 2 * 4 * 3 * 64 * 96  # layers, experts, matrices
    assert warning.startswith(f"baseModel: {experts:,} of ")
    assert warning.endswith(words)


def shard(directory: Path) -> None:
    """Splits the weights over two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


RULES_OF_A_RUN: dict[str, tuple[dict[str, Any], str]] = {
    "an optimizer of whole weights": (
        {"training": {"optimizer": "paged-adamw-8bit"}, "parallelism": {"gpusPerNode": 2}},
        "training.optimizer: paged-adamw-8bit works in blocks of whole weights",
    ),
    "groups that do not divide": (
        {"parallelism": {"gpusPerNode": 4, "strategy": "hsdp", "shardSize": 3}},
        "parallelism.shardSize: 4 processes do not divide into groups of 3",
    ),
    "a gate that measures nothing": (
        {"publish": {"gate": {"maxEvalLoss": 1.0}}, "dataset": {"eval": None, "evalFraction": 0.0}},
        "publish.gate needs records to evaluate on",
    ),
}


@pytest.mark.parametrize("case", RULES_OF_A_RUN)
def test_a_rule_that_would_end_the_run_on_its_gpus_is_told_before(check: Check, case: str) -> None:
    changes, words = RULES_OF_A_RUN[case]
    result = check(gib=24, **changes)
    assert [(found, message.startswith(words)) for found, message in said(result)] == [(BAD_SPEC, True)], said(result)


def test_shards_count_as_one_model_and_a_missing_one_is_named(check: Check, model: Path, copied: Path) -> None:
    whole = check().model
    shard(copied)
    sharded = check(baseModel={"uri": f"file://{copied}"})
    assert sharded.outcome == "passed", said(sharded)
    assert whole is not None
    assert sharded.model is not None
    assert (sharded.model.parameters, sharded.model.weight_files) == (whole.parameters, 2)
    (copied / "model-00002-of-00002.safetensors").unlink()
    missing = check(baseModel={"uri": f"file://{copied}"})
    assert [kind for kind, _ in said(missing)] == [FailureClass.MODEL_NOT_FOUND]
    assert "model-00002-of-00002.safetensors" in said(missing)[0][1]


def test_a_model_that_is_not_trained_here_is_told(check: Check, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    result = check(baseModel={"uri": f"file://{copied}"})
    assert any("quantized already" in message for kind, message in said(result) if kind == BAD_SPEC)
    (copied / "config.json").write_text("{")
    result = check(baseModel={"uri": f"file://{copied}"})
    assert any("config.json: is not JSON" in message for kind, message in said(result) if kind == BAD_SPEC)
    (copied / "config.json").unlink()
    result = check(baseModel={"uri": f"file://{copied}"})
    assert said(result)[0][0] == FailureClass.MODEL_NOT_FOUND
    assert result.data is None
    assert result.pins.train is not None, "the data is looked at all the same"


def test_only_headers_come_from_a_store(check: Check, s3: Seaweed, model: Path, data: Path, tmp_path: Path) -> None:
    uri = s3.upload(model, "preflight/model")
    train = s3.upload(data / "train.jsonl", "preflight/train.jsonl")
    changes: dict[str, Any] = {
        "baseModel": {"uri": uri},
        "dataset": {"train": {"uri": train}, "eval": None},
        "publish": {"store": s3.uri("preflight/adapters")},
    }
    result = check(**changes)
    assert result.outcome == "passed", said(result)
    assert result.model is not None
    assert result.model.parameters == 106816
    fetched = [path.name for path in (tmp_path / "preflight" / "model").iterdir()]
    assert "config.json" in fetched
    assert not [name for name in fetched if name.endswith(".safetensors")]
    again = check(**changes)
    assert again.pins == result.pins
    s3.upload(data / "eval.jsonl", "preflight/train.jsonl")
    other = check(**changes)
    assert other.pins.train != result.pins.train
    assert other.pins.base_model == result.pins.base_model


def test_a_store_that_refuses_is_told(check: Check, s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = check(publish={"store": s3.uri("preflight/adapters")})
    assert [kind for kind, _ in said(result)] == [FailureClass.AUTH_DENIED]
    assert result.plan is not None, "the rest is looked at all the same"


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_a_run_is_held_to_what_was_pinned(
    scheme: str,
    check: Check,
    make_run: Make,
    copied: Path,
    tmp_path: Path,
    s3: Seaweed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    data = tmp_path / "rows"
    write_rows(data / "train.jsonl", make_rows(12))
    write_rows(data / "eval.jsonl", make_rows(4))

    def sources() -> dict[str, Any]:
        if scheme == "file":
            model, rows = f"file://{copied}", f"file://{data}"
        else:
            model, rows = s3.upload(copied, "pinned/model"), s3.upload(data, "pinned/rows")
        train, evaluation = {"uri": f"{rows}/train.jsonl"}, {"uri": f"{rows}/eval.jsonl"}
        return {"baseModel": {"uri": model}, "dataset": {"train": train, "eval": evaluation}}

    pins = check(**sources()).pins
    pinned = make_run(**sources()).model_copy(update={"pins": pins})

    def hold(name: str) -> str:
        place, directory = Place(0, 0, 1), tmp_path / name
        sources()
        try:
            check_pins(pinned, fetch_sources(pinned, place, directory), place)
        except SourceChangedError as error:
            return str(error)
        return ""

    assert hold("same") == ""
    write_rows(data / "eval.jsonl", make_rows(5))
    assert hold("records").startswith("dataset.eval: ")
    (copied / "generation_config.json").write_text('{"eos_token_id": 1}')
    changed = hold("model")
    assert changed.startswith("baseModel: ")
    assert pins.base_model is not None
    assert str(pins.base_model.digest) in changed

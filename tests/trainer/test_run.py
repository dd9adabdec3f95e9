"""Whole runs in this process: what they publish, how they go on after a stop, and how they fail."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_FILES, AdapterManifest, parse_version_path
from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.errors import BadDataError, StoppedError, classify
from lora_trainer.measure import measure
from lora_trainer.model import load_base_model
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.speed import SPEED_VARIABLE
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store, split_uri
from lora_trainer.train import train
from tests.support.seaweed import Seaweed, free_ports
from tests.support.tiny import make_model, make_rows, write_rows

Make = Callable[..., RunSpec]


class Recorder(Progress):
    """Keeps what was reported, and asks the run to stop after a step."""

    def __init__(self, stop: StopRequest, stop_after: int | None = None) -> None:
        super().__init__(enabled=False)
        self.stop, self.stop_after = stop, stop_after
        self.losses: dict[int, float] = {}
        self.evaluations: list[tuple[int, float]] = []
        self.stages: list[str] = []

    def stage(self, stage: Any) -> None:
        self.stages.append(stage)

    def report_step(self, **fields: Any) -> None:
        super().report_step(**fields)
        self.losses[fields["step"]] = fields["loss"]
        self.stop.requested = fields["step"] == self.stop_after

    def report_eval(self, **fields: Any) -> None:
        self.evaluations.append((fields["step"], fields["eval_loss"]))


Train = Callable[..., tuple[AdapterStatus, Recorder]]


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains a run in this process. Each call is a start of its own, with an empty scratch directory."""
    starts = iter(range(100))

    def start(run: RunSpec, stop_after: int | None = None) -> tuple[AdapterStatus, Recorder]:
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / f"start-{next(starts)}"))
        stop = StopRequest()
        recorder = Recorder(stop, stop_after)
        try:
            adapter = train(run, Place(0, 0, 1), stop, recorder)
        except StoppedError as error:
            error.add_note(json.dumps(recorder.losses))
            raise
        assert adapter is not None
        return adapter, recorder

    return start


def fails(run_here: Train, run: RunSpec) -> tuple[FailureClass, str]:
    """Class and message with which ``run`` fails."""
    with pytest.raises(Exception) as caught:
        run_here(run)
    return classify(caught.value), str(caught.value)


def test_the_published_directory_is_what_was_evaluated(
    make_run: Make, run_here: Train, model: Path, data: Path
) -> None:
    run = make_run(training={"maxSteps": 6, "evalEverySteps": 4, "learningRate": 0.05}, checkpoint={"everySteps": 3})
    adapter, seen = run_here(run)
    assert adapter.eval_loss_before is not None
    assert adapter.eval_loss_after is not None
    assert adapter.eval_loss_after < adapter.eval_loss_before
    assert [step for step, _ in seen.evaluations] == [0, 4, 6]
    assert seen.stages == [
        "loading", "evaluating", "training", "checkpointing", "training", "evaluating", "training", "checkpointing",
        "training", "evaluating", "evaluating", "evaluating", "publishing", "done",
    ]  # fmt: skip
    measured = measure(model=f"file://{model}", data=f"file://{data}/eval.jsonl", adapter=adapter.uri, max_new_tokens=8)
    assert measured.loss == pytest.approx(adapter.eval_loss_after, abs=1e-5)
    with pytest.raises(BadDataError, match="--data: every record is cut at --max-seq-length 3 tokens"):
        measure(model=f"file://{model}", data=f"file://{data}/eval.jsonl", adapter=None, max_seq_length=3)
    before = measure(model=f"file://{model}", data=f"file://{data}/eval.jsonl", adapter=None, max_new_tokens=8)
    assert before.loss == pytest.approx(adapter.eval_loss_before, abs=1e-5)
    assert len(before.answers) == before.records == 9

    directory = Path("/" + split_uri(adapter.uri)[1].lstrip("/"))
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["bias"]) == (run.base_model.uri, 4, "none")
    assert not config["use_dora"]
    assert config["modules_to_save"] is None
    base = load_base_model(model, run.quantization, _cpu())
    assert isinstance(PeftModel.from_pretrained(base, directory), PeftModel)
    manifest = AdapterManifest.model_validate_json((directory / "manifest.json").read_text())
    assert manifest.lora == run.lora.to_wire()
    assert [file.path for file in manifest.extras] == ["README.md", "report.html", "metrics.jsonl"]
    left = Store(run.publish.store).sizes()
    assert not [path for path in left if "checkpoints" in path]


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def test_evaluate_writes_conversations_with_the_template_of_the_adapter(
    make_run: Make, run_here: Train, model: Path, tmp_path: Path
) -> None:
    rows = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in make_rows(20)
    ]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": row} for row in rows])
    own = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    sets = {"train": {"uri": f"file://{data}"}, "eval": {"uri": f"file://{data}"}}
    adapter, _ = run_here(make_run(dataset={**sets, "chatTemplate": own}, training={"learningRate": 0.05}))

    def loss() -> float:
        return measure(
            model=f"file://{model}", data=f"file://{data}", adapter=adapter.uri, limit=20, max_new_tokens=1
        ).loss

    assert loss() == pytest.approx(adapter.eval_loss_after, abs=1e-5)
    (Path("/" + split_uri(adapter.uri)[1].lstrip("/")) / "chat_template.jinja").unlink()
    assert loss() != pytest.approx(adapter.eval_loss_after, abs=1e-2)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_with_dropout_and_across_epochs(
    make_run: Make, run_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is stopped makes its batches ahead."""
    changes: dict[str, Any] = {"lora": {"dropout": 0.2}, "training": {"maxSteps": 8}, "checkpoint": {"everySteps": 3}}
    whole, seen = run_here(make_run(**changes, publish={"store": f"file://{tmp_path}/whole"}))
    monkeypatch.setenv(SPEED_VARIABLE, "prefetch")
    run = make_run(**changes)
    with pytest.raises(StoppedError) as first:
        run_here(run, stop_after=4)
    with pytest.raises(StoppedError) as second:
        run_here(run.model_copy(update={"attempt": 2}), stop_after=6)
    losses = [json.loads(error.value.__notes__[0]) for error in (first, second)]
    adapter, last = run_here(run.model_copy(update={"attempt": 3}))
    merged = {int(step): loss for part in losses for step, loss in part.items()} | last.losses
    assert merged == pytest.approx(seen.losses, abs=1e-6)
    assert adapter.digest == whole.digest


def test_an_attempt_after_the_last_checkpoint_only_publishes(make_run: Make, run_here: Train) -> None:
    run = make_run(training={"maxSteps": 3}, checkpoint={"everySteps": 3})
    with pytest.raises(StoppedError):
        run_here(run, stop_after=3)
    adapter, seen = run_here(run.model_copy(update={"attempt": 2}))
    assert seen.losses == {}
    assert adapter.version == 1
    again, nothing = run_here(run.model_copy(update={"attempt": 3}))
    assert again == adapter
    assert nothing.stages == []


def test_everything_comes_from_and_goes_to_a_real_s3_store(
    make_run: Make, run_here: Train, s3: Seaweed, model: Path, data: Path
) -> None:
    run = make_run(
        baseModel={"uri": s3.upload(model, "base/tiny")},
        dataset={
            "train": {"uri": s3.upload(data / "train.jsonl", "data/train.jsonl")},
            "eval": None,
            "evalFraction": 0.2,
        },
        quantization={"type": "none"},
        publish={"store": s3.uri("adapters"), "name": "other"},
        checkpoint={"everySteps": 2},
    )
    adapter, _ = run_here(run)
    assert adapter.uri.startswith("s3://models/adapters/tests/other/sha256-")
    assert adapter.served_name == "other-v1"
    names = list(Store(adapter.uri).sizes())
    extras = ["README.md", "metrics.jsonl", "report.html"]
    assert names == sorted([*ADAPTER_FILES, "manifest.json", *extras])


def test_each_format_of_records_trains(make_run: Make, run_here: Train, tmp_path: Path) -> None:
    texts = [{"text": row["prompt"] + row["completion"]} for row in make_rows(20)]
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in make_rows(20)
    ]
    alpaca = [{"instruction": row["prompt"], "output": row["completion"]} for row in make_rows(20)]
    shares = [
        {"conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]}
        for row in make_rows(20)
    ]
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in make_rows(20)]
    columns = {"columns": {"prompt": "question", "completion": "answer"}, "format": "prompt-completion"}
    kinds: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("texts", texts, {}),
        ("chats", chats, {"systemPrompt": "Be brief."}),
        ("alpaca", alpaca, {}),
        ("shares", shares, {}),
        ("renamed", renamed, columns),
    ]
    for name, rows, settings in kinds:
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        dataset = {"train": {"uri": f"file://{file}"}, "eval": None, **settings}
        adapter, _ = run_here(make_run(name=name, dataset=dataset, training={"maxSteps": 1}))
        assert adapter.eval_loss_after is not None


def test_conversations_need_a_chat_template(make_run: Make, run_here: Train, tmp_path: Path) -> None:
    bare = make_model(tmp_path / "bare", chat_template=False)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write_rows(tmp_path / "chats.jsonl", [chat] * 4)
    dataset = {"train": {"uri": f"file://{file}"}, "eval": None, "evalFraction": 0}
    found, message = fails(run_here, make_run(baseModel={"uri": f"file://{bare}"}, dataset=dataset))
    assert found == FailureClass.BAD_SPEC
    assert "chat template" in message


BAD_RUNS: dict[str, tuple[dict[str, Any], FailureClass, str]] = {
    "a model that is not there": (
        {"baseModel": {"uri": "file:///nowhere/model"}}, FailureClass.MODEL_NOT_FOUND, "config.json"),
    "a claim that is not mounted": (
        {"baseModel": {"uri": "pvc://claim/model"}}, FailureClass.MODEL_NOT_FOUND, "pvc://claim/model"),
    "a dataset that is not there": (
        {"dataset": {"train": {"uri": "file:///nowhere/a.jsonl"}}}, FailureClass.MODEL_NOT_FOUND, "a.jsonl"),
    "a module that the model does not have": (
        {"lora": {"targetModules": ["nonesuch"]}}, FailureClass.BAD_SPEC, "nonesuch"),
    "records that are cut before their completion": (
        {"dataset": {"maxSeqLength": 8}}, FailureClass.BAD_DATA, "maxSeqLength"),
    "bfloat16 on a CPU": (
        {"quantization": {"computeDtype": "bfloat16"}}, FailureClass.BAD_SPEC, "computeDtype"),
    "a batch that does not divide": (
        {"training": {"globalBatchSize": 7}}, FailureClass.BAD_SPEC, "globalBatchSize"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_cannot_work_says_why(case: str, make_run: Make, run_here: Train) -> None:
    changes, expected, words = BAD_RUNS[case]
    found, message = fails(run_here, make_run(**changes))
    assert (found, words in message) == (expected, True), message


def test_a_model_or_a_key_that_the_store_does_not_know(
    make_run: Make, run_here: Train, s3: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = make_run(baseModel={"uri": s3.uri("base/nowhere")})
    assert fails(run_here, missing)[0] == FailureClass.MODEL_NOT_FOUND
    no_bucket = make_run(baseModel={"uri": "s3://nowhere/base"})
    assert fails(run_here, no_bucket)[0] == FailureClass.MODEL_NOT_FOUND
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert fails(run_here, missing)[0] == FailureClass.AUTH_DENIED
    assert fails(run_here, make_run(publish={"store": s3.uri("adapters")}))[0] == FailureClass.AUTH_DENIED


def test_a_store_that_is_down_is_given_up_in_bounded_time(
    make_run: Make, run_here: Train, s3: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("LORA_STORE_RETRY_SECONDS", "1")
    found, message = fails(run_here, make_run(baseModel={"uri": s3.uri("base/tiny")}))
    assert found == FailureClass.STORE_UNAVAILABLE
    assert "within 1 s" in message


def test_a_full_disk_is_told_from_a_store_that_fails(
    s3: Seaweed, model: Path, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(baseModel={"uri": s3.upload(model, "base/full")})
    scratch = tmp_path / "full"
    (scratch / "sources" / "model").mkdir(parents=True)
    (scratch / "sources" / "model" / "model.safetensors").symlink_to("/dev/full")
    monkeypatch.setenv("LORA_STATE_DIR", str(scratch))
    stop = StopRequest()
    with pytest.raises(OSError, match="No space left") as caught:
        train(run, Place(0, 0, 1), stop, Recorder(stop))
    assert classify(caught.value) == FailureClass.DISK_FULL


def test_weights_that_overflow_end_the_run_before_any_weight_is_changed(
    make_run: Make, run_here: Train, model: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    changes: dict[str, Any] = {"baseModel": {"uri": f"file://{broken}"}}
    found, message = fails(run_here, make_run(**changes))
    assert (found, "evaluation loss" in message) == (FailureClass.DIVERGED, True), message
    found, message = fails(run_here, make_run(**changes, dataset={"eval": None, "evalFraction": 0}))
    assert (found, "step 3: the gradient" in message) == (FailureClass.DIVERGED, True), message


def test_versions_count_up_and_equal_bytes_are_one_version(make_run: Make, run_here: Train) -> None:
    training = {"maxSteps": 1}
    first, _ = run_here(make_run(training=training))
    same, _ = run_here(make_run(uid="uid-2", training=training))
    other, _ = run_here(make_run(uid="uid-3", training=training | {"seed": 7}))
    assert (first.version, same.version, other.version) == (1, 1, 2)
    assert first.digest == same.digest != other.digest
    paths = Store(make_run().publish.store).sizes("tests/tiny/versions")
    assert [parse_version_path(path) for path in paths] == [1, 2]
    assert math.isfinite(other.eval_loss_after or math.nan)

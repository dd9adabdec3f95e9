"""microBatchSize auto in real runs: equal on all processes, recorded, kept on a resume, refused if nothing fits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_api.adapter import CompleteMarker
from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec
from lora_trainer import hostmemory, sizing
from lora_trainer.errors import BadSpecError
from lora_trainer.settings import Place
from tests.trainer.runs import Launched

Make = Callable[..., RunSpec]
Launch = Callable[..., Launched]
CPU = torch.device("cpu")
ALONE = Place(0, 0, 1)
HUGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}


def marker(world_size: int, micro_batch: int | None) -> CompleteMarker:
    document = {
        "step": 2,
        "worldSize": world_size,
        "globalBatchSize": 8,
        "files": [],
        "createdAt": "2026-01-01T00:00:00Z",
    }
    return CompleteMarker.model_validate({**document, "microBatchSize": micro_batch})


@pytest.fixture
def huge(model: Path, tmp_path: Path) -> Path:
    """A model's directory of which only the configuration is read: 70 billion weights."""
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps({**config, **HUGE, "head_dim": 128}))
    return tmp_path / "huge"


RESUMED = [
    ("no checkpoint", None, 8),
    ("as many processes", marker(1, 2), 2),
    ("another number of processes", marker(2, 2), 8),
    ("a checkpoint of older days", marker(1, None), 8),
]


@pytest.mark.parametrize(("before", "wanted"), [row[1:] for row in RESUMED], ids=[row[0] for row in RESUMED])
def test_a_resumed_run_keeps_its_micro_batch(
    make_run: Make, model: Path, before: CompleteMarker | None, wanted: int
) -> None:
    run = make_run(training={"microBatchSize": "auto"})
    settled, record = sizing.settle_micro_batch(run, model, ALONE, CPU, lambda: before)
    assert settled.training.micro_batch_size == record.micro_batch == wanted
    assert record.gradient_accumulation == 8 // wanted
    assert record.plan is not None
    assert record.planned == record.plan.total > 0


def test_what_cannot_fit_is_refused_with_its_remedies(make_run: Make, huge: Path) -> None:
    run = make_run(training={"microBatchSize": "auto"}, dataset={"maxSeqLength": 131072})
    with pytest.raises(BadSpecError, match=r"not even 1 x 131072 tokens fit: a process needs .* GiB") as caught:
        sizing.settle_micro_batch(run, huge, ALONE, CPU, lambda: None)
    assert "cpuOffload" not in str(caught.value)


def test_what_the_user_chose_is_warned_of(make_run: Make, huge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settled, _ = sizing.settle_micro_batch(make_run(), huge, ALONE, CPU, lambda: marker(1, 4))
    assert settled.training.micro_batch_size == 2
    assert "training.microBatchSize: 2 x 64 tokens do not fit" in capsys.readouterr().err


def test_an_architecture_without_a_plan_is_trained_one_sequence_at_a_time(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    run = make_run(training={"microBatchSize": "auto"})
    settled, record = sizing.settle_micro_batch(run, tmp_path, ALONE, CPU, lambda: None)
    assert (settled.training.micro_batch_size, record.plan, record.planned) == (1, None, None)
    assert "auto is 1 for this model: config.json: model_type is 'mamba'" in capsys.readouterr().err
    settled, _ = sizing.settle_micro_batch(make_run(), tmp_path, ALONE, CPU, lambda: None)
    assert settled.training.micro_batch_size == 2


def test_the_processes_of_a_pod_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_bytes", lambda: 8 * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sizing.least_available(ALONE, CPU) == 2.0
    monkeypatch.setattr(sizing, "available_bytes", lambda: None)
    assert sizing.least_available(ALONE, CPU) is None
    assert hostmemory.available_bytes(Path("/none"), Path("/none"), Path("/none")) is None


def test_a_gang_agrees_and_records_what_it_planned_and_measured(make_run: Make, launch: Launch, tmp_path: Path) -> None:
    run = make_run(training={"microBatchSize": "auto"}, parallelism={"nodes": 2})
    pod = launch(run)
    assert pod.wait() == 0, pod.log.read_text()[-3000:]
    planned, measured = [line for line in pod.lines if line.event == "memory"]
    assert (planned.micro_batch_size, planned.gradient_accumulation_steps) == (4, 1)
    assert planned.planned_gib is not None
    assert planned.available_gib is not None
    assert 0 < planned.planned_gib < planned.available_gib
    assert planned.host_gib is None
    assert measured.planned_gib == planned.planned_gib
    assert 0.1 < (measured.host_gib or 0) < 8
    assert measured.allocated_gib is None, "that is of GPUs"
    assert pod.words.adapter is not None
    report = (Path(pod.words.adapter.uri.removeprefix("file://")) / "report.html").read_text()
    assert "measured: resident memory of the process, GiB" in report
    assert f"{measured.planned_gib:.3f}" in report


def test_a_gang_is_refused_as_one(make_run: Make, launch: Launch, huge: Path, model: Path) -> None:
    for file in model.iterdir():
        if file.name != "config.json":
            (huge / file.name).symlink_to(file)
    run = make_run(baseModel={"uri": f"file://{huge}"}, training={"microBatchSize": "auto"}, parallelism={"nodes": 2})
    pod = launch(run)
    assert pod.wait() == RULES[FailureClass.BAD_SPEC].exit_code, pod.log.read_text()[-3000:]
    assert "not even 1 x 21 tokens fit: a process needs" in pod.words.message
    assert not [line for line in pod.lines if line.event == "memory"]

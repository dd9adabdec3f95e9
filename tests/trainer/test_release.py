"""What is proven before an adapter is published: the gate, the files that the store gives back, and their loss."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lora_trainer.release
from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.errors import BadSpecError, GateRefusedError, InternalError, StoppedError, classify
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store
from lora_trainer.train import train
from lora_trainer.verify import compare, published_scale, take
from tests.support.seaweed import Seaweed, free_ports
from tests.trainer.runs import Launched

Make = Callable[..., RunSpec]
Train = Callable[..., AdapterStatus]
ROOT = "tests/tiny"


class StopAfter(Progress):
    """Asks the run to stop after a step."""

    def __init__(self, stop: StopRequest, step: int | None) -> None:
        super().__init__(enabled=False)
        self.stop, self.last = stop, step

    def report_step(self, **fields: Any) -> None:
        super().report_step(**fields)
        self.stop.requested = fields["step"] == self.last


@pytest.fixture
def train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains a run in this process, with an empty scratch directory each time."""
    numbers: Iterator[int] = iter(range(100))

    def start(run: RunSpec, stop_after: int | None = None) -> AdapterStatus:
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / f"release-{next(numbers)}"))
        stop = StopRequest()
        adapter = train(run, Place(0, 0, 1), stop, StopAfter(stop, stop_after))
        assert adapter is not None
        return adapter

    return start


def published(store: Store) -> list[str]:
    """Manifests and versions below the adapter's name."""
    return [path for path in store.sizes(ROOT) if path.endswith("manifest.json") or "/versions/" in path]


def test_a_refused_adapter_is_not_published_and_its_report_and_checkpoint_are_kept(
    make_run: Make, train_here: Train
) -> None:
    run = make_run(publish={"gate": {"minEvalLossImprovement": 50.0}}, checkpoint={"everySteps": 2})
    store = Store(run.publish.store)
    with pytest.raises(GateRefusedError) as refused:
        train_here(run)
    assert classify(refused.value) == FailureClass.GATE_REFUSED
    left = list(store.sizes(ROOT))
    assert [path for path in left if "checkpoints" not in path] == [
        f"{ROOT}/refused/uid-1/metrics.jsonl", f"{ROOT}/refused/uid-1/report.html",
    ]  # fmt: skip
    assert f"{ROOT}/checkpoints/uid-1/step-4/COMPLETE.json" in left
    assert store.get(f"{ROOT}/refused/uid-1/metrics.jsonl").count(b"eval_loss") == 2
    for words in (
        "the evaluation loss on the base as it is served (float32, 9 records) was ", "before training", "after it",
        "minEvalLossImprovement asks for an improvement of 50", store.url(f"{ROOT}/refused/uid-1"),
    ):  # fmt: skip
        assert words in str(refused.value)
    assert "Not published" in store.get(f"{ROOT}/refused/uid-1/report.html").decode()

    passes = run.model_copy(update={"publish": make_run(publish={"gate": {"maxEvalLoss": 50.0}}).publish, "attempt": 2})
    adapter = train_here(passes)
    assert adapter.version == 1
    assert not [path for path in store.sizes(ROOT) if "checkpoints" in path]


def test_a_gate_needs_evaluation_records(make_run: Make, train_here: Train) -> None:
    run = make_run(dataset={"eval": None, "evalFraction": 0.0}, publish={"gate": {"maxEvalLoss": 1.0}})
    with pytest.raises(BadSpecError, match=r"publish\.gate needs records to evaluate on.*dataset\.eval"):
        train_here(run)


def test_metrics_and_report_cover_every_attempt(make_run: Make, train_here: Train, tmp_path: Path) -> None:
    run = make_run(
        training={"maxSteps": 6, "evalEverySteps": 2}, checkpoint={"everySteps": 100}, tracking={"tensorboard": True}
    )
    with pytest.raises(StoppedError):
        train_here(run, stop_after=2)
    with pytest.raises(StoppedError):
        train_here(run.model_copy(update={"attempt": 2}), stop_after=4)
    adapter = train_here(run.model_copy(update={"attempt": 3}))
    lines = Store(adapter.uri).get("metrics.jsonl").decode().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [0, 2, 4, 6]
    assert metrics[0]["eval_loss"] == adapter.eval_loss_before
    assert metrics[-1]["eval_loss"] == adapter.eval_loss_after
    names = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "at"}
    assert all(set(line) == names for line in metrics if "loss" in line)
    assert all(line["tokens_per_second"] > 0 for line in metrics if "loss" in line)
    assert [line["at"] for line in metrics] == sorted(line["at"] for line in metrics)
    (events,) = (name for name in Store(adapter.uri).sizes() if "tfevents" in name)
    Store(adapter.uri).download(events, tmp_path / "events" / events)
    read = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in read.Scalars("eval/loss")] == [0, 2, 4, 6]
    report = Store(adapter.uri).get("report.html").decode()
    assert report.count("<circle") == 4
    assert adapter.served is not None
    assert f"the same bytes; evaluation loss {adapter.served.after.loss:.6f}, in memory" in report


def flip_byte(store: Store, path: str) -> None:
    content = bytearray(store.get(path))
    content[-1] ^= 1
    store.put(path, bytes(content))


DAMAGES: dict[str, tuple[str, Callable[[Store, str], None], str]] = {
    "one bit of the weights": (ADAPTER_WEIGHTS, flip_byte, "SHA-256"),
    "the weights cut off": (ADAPTER_WEIGHTS, lambda s, path: s.put(path, s.get(path)[:-5]), "damages what it holds"),
    "the configuration of another": (ADAPTER_CONFIG, lambda s, path: s.put(path, b'{"r": 8}'), ADAPTER_CONFIG),
}


def test_a_store_that_damages_what_it_holds_is_found_before_a_version_exists(
    make_run: Make, train_here: Train, s3: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.upload
    run = make_run(publish={"store": s3.uri("damaged")}, checkpoint={"everySteps": 4})
    store = Store(run.publish.store)
    for number, (name, damage, words) in enumerate(DAMAGES.values(), start=1):

        def upload(self: Store, source: Path, path: str, name: str = name, damage: Any = damage) -> None:
            real(self, source, path)
            if path.endswith(name):
                damage(self, path)

        monkeypatch.setattr(Store, "upload", upload)
        with pytest.raises(InternalError, match=words) as failed:
            train_here(run.model_copy(update={"attempt": number}))
        assert name in str(failed.value)
        assert published(store) == []
    monkeypatch.setattr(Store, "upload", real)
    assert train_here(run.model_copy(update={"attempt": 9})).version == 1, "the next attempt puts it right"


def double_alpha(directory: Path) -> None:
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    (directory / ADAPTER_CONFIG).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 4}))


def swap_signs(directory: Path) -> None:
    change_weights(directory, lambda tensors: {name: -t if "lora_B" in name else t for name, t in tensors.items()})


def lose_one(directory: Path) -> None:
    change_weights(directory, lambda tensors: dict(list(tensors.items())[1:]))


def add_one(directory: Path) -> None:
    change_weights(directory, lambda tensors: {**tensors, "base_model.model.x.lora_A.weight": torch.ones(1, 1)})


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(directory / ADAPTER_WEIGHTS)), directory / ADAPTER_WEIGHTS)


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another scale": (double_alpha, "has the evaluation loss"),
    "other values": (swap_signs, "has the evaluation loss"),
    "a missing matrix": (lose_one, "has no base_model"),
    "a matrix of nothing": (add_one, "weights of nothing in the model"),
}


def test_files_that_are_whole_but_not_what_was_trained_are_found_before_a_version_exists(
    make_run: Make, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(training={"learningRate": 0.05}, checkpoint={"everySteps": 4})
    real = lora_trainer.release.write_adapter
    for number, (mistake, words) in enumerate(MISTAKES.values(), start=1):

        def write(tensors: Any, model: Any, run: Any, directory: Path, mistake: Any = mistake) -> None:
            real(tensors, model, run, directory)
            mistake(directory)

        monkeypatch.setattr(lora_trainer.release, "write_adapter", write)
        with pytest.raises(InternalError, match=words):
            train_here(run.model_copy(update={"attempt": number}))
        assert published(Store(run.publish.store)) == []


def test_losses_may_differ_by_a_thousandth() -> None:
    assert compare(2.0, 2.0019).from_store == 2.0019
    assert compare(0.01, 0.0109).in_memory == 0.01
    assert compare(None, None).from_store is None
    for other in (2.0021, 1.99, float("nan")):
        with pytest.raises(InternalError, match="not what was trained"):
            compare(2.0, other)


def test_ranks_that_were_filled_up_are_cut_again() -> None:
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(take("x", whole, torch.Size([2, 2])), whole[:2])
    for shape in ([4, 2], [2, 3], [2]):
        with pytest.raises(InternalError, match="instead of"):
            take("x", whole, torch.Size(shape))
    with pytest.raises(InternalError, match="more rows"):
        take("x", whole, torch.Size([1, 2]))
    assert published_scale({"lora_alpha": 8, "r": 4}) == 2
    assert published_scale({"lora_alpha": 8, "r": 4, "use_rslora": True}) == 4


def test_two_pods_prove_and_merge_what_they_publish_while_every_tracker_is_down(
    make_run: Make, launch: Callable[..., Launched]
) -> None:
    """Sharded weights: all ranks load what rank 0 read back."""
    (port,) = free_ports(1)
    nobody = f"http://127.0.0.1:{port}"
    run = make_run(
        parallelism={"nodes": 2, "gpusPerNode": 0},
        publish={"gate": {"maxEvalLoss": 50.0}, "mergeBase": True},
        tracking={
            "wandb": {"project": "p", "baseUrl": nobody},
            "mlflow": {"trackingUri": nobody, "experiment": "e"},
            "tensorboard": True,
        },
    )
    pod = launch(run, LORA_TRACKING_SECONDS="2", WANDB_API_KEY="0123456789" * 4)
    log = pod.log.read_text
    assert pod.wait() == 0, log()[-5000:]
    adapter = pod.words.adapter
    assert adapter is not None
    assert adapter.merged_uri is not None
    names = set(Store(adapter.uri).sizes())
    assert {"manifest.json", "metrics.jsonl", "report.html"} < names
    assert any("tfevents" in name for name in names)
    assert adapter.served is not None
    assert (
        f"the same bytes; evaluation loss {adapter.served.after.loss:.6f}"
        in Store(adapter.uri).get("report.html").decode()
    )
    assert {"manifest.json", "model.safetensors", "config.json"} < set(Store(adapter.merged_uri).sizes())
    told = [line for line in log().splitlines() if line.startswith("tracking: ")]
    assert sorted(line.split(":")[1].strip() for line in told) == ["MLflow", "Weights & Biases"]

"""A run that goes on from a checkpoint of another one (checkpoint.resumeFrom): to the bit, and without touching it."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import COMPLETE_FILE, EXPIRES_FILE, AdapterManifest, ExpiryMarker
from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_trainer.checkpoint import Checkpoints
from lora_trainer.cli import main
from lora_trainer.errors import StoreUnavailableError
from lora_trainer.launch import free_port
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.store import Store
from tests.support.seaweed import Seaweed
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import Launched, build_run, merge, start_pod
from tests.trainer.zygote import Zygote

Make = Callable[..., RunSpec]
Start = Callable[..., Launched]
SIX: dict[str, Any] = {
    "lora": {"dropout": 0.1},
    "training": {"maxSteps": 6},
    "checkpoint": {"everySteps": 2, "keep": 5},
}
REFUSED = {"publish": {"gate": {"maxEvalLoss": 1e-6}}, "uid": "old"}
"""Ends after its last step, and keeps its checkpoints."""
HERE = "tests/tiny/checkpoints"


def succeed(pod: Launched) -> str:
    assert pod.wait() == 0, pod.log.read_text()[-5000:]
    assert pod.words.adapter is not None
    return pod.words.adapter.digest


def refused(pod: Launched, words: str) -> str:
    """What a pod said that ended with BadSpec."""
    assert pod.wait() == 64, pod.log.read_text()[-5000:]
    assert pod.words.failure_class == FailureClass.BAD_SPEC
    assert words in pod.words.message
    return pod.words.message


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def left(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[tuple[Path, str, dict[int, float]]]:
    """Checkpoints of steps 2, 4 and 6; and the digest and the losses of a run of six steps with nothing in its way."""
    directory = tmp_path_factory.mktemp("left")
    run = build_run(model, data, directory, merge(SIX, REFUSED))
    with start_pod(run, directory / "pod", zygote=zygote) as pod:
        assert pod.wait() != 0
        assert pod.words.failure_class == FailureClass.GATE_REFUSED, pod.log.read_text()[-5000:]
    whole = tmp_path_factory.mktemp("whole")
    with start_pod(build_run(model, data, whole, SIX), whole / "pod", zygote=zygote) as pod:
        digest = succeed(pod)
        yield directory / "store" / HERE / "old", digest, pod.losses


@pytest.fixture
def source(left: tuple[Path, str, dict[int, float]], tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4 in the store of this test's runs, where a run called tiny would have left them."""
    directory = tmp_path / "store" / HERE / "old"
    shutil.copytree(left[0], directory)
    shutil.rmtree(directory / "step-6")
    return directory


@pytest.fixture
def resumed(make_run: Make) -> Make:
    """A run of six steps that goes on from a run called tiny, as which it is called too."""
    base = merge(SIX, {"checkpoint": {"resumeFrom": {"name": "tiny"}}, "uid": "new"})
    return lambda **changes: make_run(**merge(base, changes))


def test_it_goes_on_to_the_bit_and_leaves_the_other_alone(
    source: Path, left: tuple[Path, str, dict[int, float]], resumed: Make, fork: Start, tmp_path: Path
) -> None:
    before = contents(source)
    pod = fork(resumed())
    assert succeed(pod) == left[1]
    assert pod.losses == {step: loss for step, loss in left[2].items() if step > 4}
    assert contents(source) == before
    url = f"file://{source}/step-4"
    assert f"goes on from step 4 of {url} (checkpoint.resumeFrom)\n" in pod.log.read_text()
    assert "warning: checkpoint.resumeFrom" not in pod.log.read_text()
    assert [line.checkpoint_step for line in pod.lines if line.event == "step"] == [4, 4]
    (file,) = (tmp_path / "store/tests/tiny").glob("sha256-*/manifest.json")
    assert AdapterManifest.model_validate_json(file.read_text()).resumed_from == url
    assert f"The first of these steps are those of the checkpoint `{url}`." in (file.parent / "README.md").read_text()
    assert not (source.parent / "new").exists() or contents(source.parent / "new") == {}


def test_its_own_checkpoints_win(
    source: Path, left: tuple[Path, str, dict[int, float]], resumed: Make, fork: Start, tmp_path: Path
) -> None:
    """The first attempt begins with the checkpoint of step 2 and ends before it publishes, the second has its own."""
    shutil.rmtree(source / "step-4")
    first = fork(resumed(publish=REFUSED["publish"]))
    assert first.wait() != 0
    assert min(first.losses) == 3
    shutil.rmtree(source.parent / "new/step-6")
    marker = source / "step-2" / COMPLETE_FILE
    marker.write_text(marker.read_text().replace('"seed":42', '"seed":43').replace('"seed": 42', '"seed": 43'))
    second = fork(resumed().model_copy(update={"attempt": 2}))
    assert succeed(second) == left[1]
    assert min(second.losses) == 5
    (file,) = (tmp_path / "store/tests/tiny").glob("sha256-*/manifest.json")
    resumed_from = AdapterManifest.model_validate_json(file.read_text()).resumed_from
    assert resumed_from == f"file://{source}/step-2", "what the first attempt began with"


def test_a_damaged_one_is_passed_over_and_not_touched(
    source: Path, left: tuple[Path, str, dict[int, float]], resumed: Make, fork: Start
) -> None:
    file = source / "step-4/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = contents(source)
    pod = fork(resumed())
    assert succeed(pod) == left[1]
    assert min(pod.losses) == 3
    assert f"{source}/step-4 is damaged and is passed over" in pod.log.read_text()
    assert contents(source) == before


def test_where_all_are_damaged_it_begins_with_none(source: Path, resumed: Make, fork: Start) -> None:
    for step in (2, 4):
        (source / f"step-{step}/adapter.safetensors").write_bytes(
            bytes((source / f"step-{step}/adapter.safetensors").stat().st_size)
        )
    message = refused(fork(resumed()), "each of the 2 checkpoints is damaged")
    assert f"below file://{source.parent};" in message


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "another shape": ({"lora": {"r": 8}}, "was made with lora.r 4, this run has lora.r 8"),
    "another batch": ({"training": {"globalBatchSize": 4}}, "training.globalBatchSize 8, this run has"),
    "no step left": ({"training": {"maxSteps": 4}}, "is of step 4, and this run has 4 steps"),
    "another name": ({"checkpoint": {"resumeFrom": {"name": "other"}}}, "there is no complete checkpoint below"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(case: str, source: Path, resumed: Make, fork: Start) -> None:
    changes, words = REFUSALS[case]
    before = contents(source)
    assert refused(fork(resumed(**changes)), words).startswith("checkpoint.resumeFrom: ")
    assert contents(source) == before


def test_another_base_model_and_an_older_trainer_are_refused(
    source: Path, model: Path, resumed: Make, fork: Start, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    message = refused(fork(resumed(baseModel={"uri": f"file://{other}"})), "was trained on the base model file://")
    assert message.count("sha256:") == 2
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    marker = source / "step-4" / COMPLETE_FILE
    document = json.loads(marker.read_text())
    assert document["baseModel"]["uri"] != f"file://{moved}"
    succeed(fork(resumed(baseModel={"uri": f"file://{moved}"})))
    for field in ("run", "baseModel", "lora", "objective", "optimizer", "data", "retainHours"):
        del document[field]
    marker.write_text(json.dumps(document))
    refused(fork(resumed(uid="newer")), "trainer of an older version")


def test_two_processes_go_on_with_other_records_a_longer_schedule_and_another_rate(
    source: Path, resumed: Make, fork: Start, tmp_path: Path
) -> None:
    """The evaluation before training is that of the base model on the new records."""
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(40, start=500))
    changes: dict[str, Any] = {
        "dataset": {"train": {"uri": f"file://{rows}"}, "eval": {"uri": f"file://{rows}"}},
        "training": {"maxSteps": 9, "learningRate": 0.002, "loggingSteps": 2, "scheduler": "constant"},
        "parallelism": {"nodes": 2},
    }
    pod = fork(resumed(**changes))
    succeed(pod)
    assert "warning: checkpoint.resumeFrom: dataset is not what" in pod.log.read_text()
    steps = [line for line in pod.lines if line.event == "step"]
    assert [(line.step, line.total_steps) for line in steps] == [(6, 9), (8, 9)]
    assert {line.learning_rate for line in steps} == {0.002}
    fresh = fork(resumed(**changes, checkpoint={"resumeFrom": None}, uid="fresh", name="fresh"))
    succeed(fresh)
    at_zero = [next(line.eval_loss for line in one.lines if line.event == "eval") for one in (pod, fresh)]
    assert at_zero[0] == at_zero[1]


def test_a_sharded_adapter_goes_on_to_the_bit(make_run: Make, tmp_path: Path, fork: Start) -> None:
    """It is loaded after the evaluation of the base model, which has gathered the shards and has let them go."""
    base = merge(SIX, {"training": {"maxSteps": 4}, "parallelism": {"nodes": 2, "strategy": "fsdp"}})
    store = {"publish": {"store": f"file://{tmp_path}/whole"}}
    whole = succeed(fork(make_run(**merge(base, store))))
    first = fork(make_run(**merge(base, REFUSED)))
    assert first.wait() != 0
    shutil.rmtree(tmp_path / "store" / HERE / "old/step-4")
    again = fork(make_run(**merge(base, {"checkpoint": {"resumeFrom": {"name": "tiny"}}, "uid": "new"})))
    assert succeed(again) == whole
    assert min(again.losses) == 3


def test_preference_pairs_go_on_to_the_bit(make_run: Make, tmp_path: Path, fork: Start) -> None:
    rows = [{**row, "chosen": row.pop("completion"), "rejected": "no"} for row in make_rows(24)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    base = {
        "dataset": {"train": {"uri": f"file://{pairs}"}, "eval": None, "evalFraction": 0.2},
        "training": {"objective": "dpo", "maxSteps": 4, "globalBatchSize": 4},
        "checkpoint": {"everySteps": 2, "keep": 5},
    }
    store = {"publish": {"store": f"file://{tmp_path}/whole"}}
    whole = succeed(fork(make_run(**merge(base, store))))
    first = fork(make_run(**merge(base, REFUSED)))
    assert first.wait() != 0
    shutil.rmtree(tmp_path / "store" / HERE / "old/step-4")
    again = fork(make_run(**merge(base, {"checkpoint": {"resumeFrom": {"name": "tiny"}}, "uid": "new"})))
    assert succeed(again) == whole
    assert min(again.losses) == 3


def test_from_a_store_with_the_s3_api(
    source: Path, left: tuple[Path, str, dict[int, float]], resumed: Make, fork: Start, s3: Seaweed
) -> None:
    """By a uri, below another prefix than the one that is published to."""
    uri = s3.upload(source, "lab/tests/old/checkpoints/u-1")
    run = resumed(
        publish={"store": s3.uri("resume-from")}, checkpoint={"resumeFrom": {"name": None, "uri": uri}}, uid="of-s3"
    )
    before = Store(uri).entries()
    assert succeed(fork(run, **s3.environment)) == left[1]
    assert Store(uri).entries() == before


# -- until when they are kept


def expiries(directory: Path) -> dict[str, ExpiryMarker]:
    files = directory.glob(f"*/{EXPIRES_FILE}")
    return {file.parent.name: ExpiryMarker.model_validate_json(file.read_text()) for file in files}


def test_an_attempt_that_fails_or_is_stopped_says_until_when_and_the_next_takes_it_back(
    make_run: Make, fork: Start, tmp_path: Path
) -> None:
    run = make_run(training={"maxSteps": 400, "loggingSteps": 1}, checkpoint={"everySteps": 2, "retainHours": 5})
    own = tmp_path / "store" / HERE / run.uid
    first = fork(run)
    first.wait_for(lambda line: (line.checkpoint_step or 0) >= 4)
    assert expiries(own) == {}, "not at each save"
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.log.read_text()[-3000:]
    complete = {file.parent.name for file in own.glob(f"*/{COMPLETE_FILE}")}
    found = expiries(own)
    assert found.keys() == complete
    (why,) = {(expiry.run, expiry.retain_hours, expiry.why) for expiry in found.values()}
    assert why == ("tiny", 5, "Checkpointed")
    second = fork(run.model_copy(update={"attempt": 2}))
    second.wait_for(lambda line: line.event == "step")
    assert expiries(own) == {}
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == 75
    assert expiries(own)
    document = run.model_copy(update={"attempt": 3}).to_wire()
    document["training"]["seed"] = 1
    third = fork(RunSpec.model_validate(document))
    assert third.wait() == 64
    assert {expiry.why for expiry in expiries(own).values()} == {"BadSpec"}


def test_what_a_deleted_run_of_the_name_has_left_is_deleted_once_it_has_expired(
    source: Path, make_run: Make, fork: Start
) -> None:
    """One that has not expired stays, and so does that of another name, which may be alive."""
    for file in source.glob(f"*/{EXPIRES_FILE}"):
        file.unlink()  # as a run that was killed leaves it
    places = {name: Path(shutil.copytree(source, source.parent / name)) for name in ("kept", "foreign")}
    for name, place in {**places, "old": source}.items():
        for file in place.glob(f"*/{COMPLETE_FILE}"):
            document = json.loads(file.read_text())
            hours = 10**6 if name == "kept" else 1
            file.write_text(
                json.dumps({**document, "run": "other" if name == "foreign" else "tiny", "retainHours": hours})
            )
            os.utime(file, (1e9, 1e9))
    pod = fork(make_run(uid="new"))
    succeed(pod)
    assert not source.exists() or contents(source) == {}
    assert f"deleted the checkpoints of a deleted run of this name: file://{source}: step 2, 4, " in pod.log.read_text()
    assert [len(list(place.glob(f"*/{COMPLETE_FILE}"))) for place in places.values()] == [2, 2]


def test_a_sweep_that_fails_hinders_nothing(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    own = Checkpoints(Store(run.publish.store), run, Place(0, 0, 1), tmp_path / "x", Progress(enabled=False))
    own.catalog.store.put(own.catalog.path(2, EXPIRES_FILE), b"{}")

    def fail(*_: object) -> list[str]:
        raise StoreUnavailableError("the store is away")

    monkeypatch.setattr("lora_trainer.checkpoint.sweep_name", fail)
    own.tidy()
    assert own.catalog.store.sizes() == {}
    assert "left could not be deleted: the store is away" in capsys.readouterr().err


def test_the_command_sweeps_a_store_with_the_s3_api(
    left: tuple[Path, str, dict[int, float]], s3: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the store's clock, which is the only one that is told to be a week ahead here."""
    for uid in ("dead", "alive"):
        s3.upload(left[0], f"swept/tests/tiny/checkpoints/{uid}")
    uri, alive = s3.uri("swept"), tmp_path / "runs"
    alive.write_text("alive Running\n")
    command = ["sweep", uri, "--alive", str(alive)]
    store = Store(uri)
    before = store.sizes()
    assert abs(store.now("probe") - datetime.now(UTC)) < timedelta(minutes=1)
    assert main(command) == 0
    assert store.sizes() == before, "nothing has expired, and the object that told the time is gone"
    now = Store.now
    monkeypatch.setattr(Store, "now", lambda self, path: now(self, path) + timedelta(hours=169))
    assert main([*command, "--dry-run"]) == 0
    assert store.sizes() == before
    assert main(command) == 0
    assert store.sizes() == {path: size for path, size in before.items() if "/alive/" in path} != {}


def test_the_command_without_keys_and_without_a_store(
    s3: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a\n")
    command = ["sweep", s3.uri("swept"), "--alive", str(tmp_path / "runs")]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main(command) == 67
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("LORA_STORE_RETRY_SECONDS", "0.1")
    assert main(command) == 74
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["AuthDenied", "StoreUnavailable"]

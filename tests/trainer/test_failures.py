"""Every row of the failure table, provoked for real; roots told from their echoes; steps that are not finite."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_api.failures import FAILURE_RULES, RULES, FailureClass, FailureRule
from lora_api.preflight import Pins
from lora_api.run import RunSpec
from lora_api.sources import DataSource
from lora_trainer.gpuerrors import GPU_ERRORS
from lora_trainer.launch import free_port
from lora_trainer.modelfiles import pin_data
from tests.support.seaweed import Seaweed, free_ports
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import Launched

Make = Callable[..., RunSpec]
Start = Callable[..., Launched]
TWO = {"parallelism": {"nodes": 2, "gpusPerNode": 0}}
ECHOES = {FailureClass.PEER_LOST, FailureClass.CHECKPOINTED}

SEEN_BY_KUBERNETES: dict[FailureClass, str] = {
    FailureClass.HOST_OUT_OF_MEMORY: "cluster/test_faults.py",
    FailureClass.POD_LOST: "controlplane/lifecycle/test_lifecycle.py",
    FailureClass.EVICTED: "controlplane/lifecycle/test_lifecycle.py",
    FailureClass.NODE_LOST: "controlplane/lifecycle/test_lifecycle.py",
    FailureClass.IMAGE_PULL_FAILED: "controlplane/lifecycle/test_lifecycle.py",
    FailureClass.POD_NOT_STARTED: "controlplane/lifecycle/test_lifecycle.py",
    FailureClass.NAME_CONFLICT: "controlplane/lifecycle/test_lifecycle.py",
    FailureClass.RUNTIME_REFUSED: "controlplane/lifecycle/test_runtimes.py",
    FailureClass.STALLED: "controlplane/lifecycle/test_policy.py",
    FailureClass.DEADLINE_EXCEEDED: "controlplane/lifecycle/test_policy.py",
    FailureClass.NOT_PLACED: "controlplane/lifecycle/test_places.py",
    FailureClass.NO_PROGRESS: "controlplane/lifecycle/test_budget.py",
}
"""Rows without an exit code of the trainer, and the tests that provoke them."""


@dataclass
class Bench:
    """What provocations are made with."""

    make_run: Make
    fork: Start
    s3: Seaweed
    model: Path
    tmp_path: Path
    full_disk: Path

    def start(self, environment: dict[str, str] | None = None, entry: str = "", **changes: Any) -> Launched:
        """A run on two processes of one pod."""
        return self.fork(self.make_run(**{**TWO, **changes}), entry, **(environment or {}))

    def start_pods(self, *environments: dict[str, str], **changes: Any) -> list[Launched]:
        """A run on two pods, each with an environment of its own."""
        place = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
        run = self.make_run(**{**TWO, **changes})
        return [
            self.fork(run, PET_NODE_RANK=str(rank), **place, **environment)
            for rank, environment in enumerate(environments)
        ]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def bench(make_run: Make, fork: Start, s3: Seaweed, model: Path, tmp_path: Path, full_disk: Path) -> Bench:
    return Bench(make_run, fork, s3, model, tmp_path, full_disk)


def bad_spec(bench: Bench) -> Launched:
    return bench.start(lora={"targetModules": ["nonesuch"]})


def bad_data(bench: Bench) -> Launched:
    rows = [json.dumps({"prompt": "a", "completion": "b"})] * 5
    rows[3] = json.dumps({"prompt": "a", "completion": 7})
    (bench.tmp_path / "bad.jsonl").write_text("\n".join(rows))
    return bench.start(dataset={"train": {"uri": f"file://{bench.tmp_path}/bad.jsonl"}, "eval": None})


def model_not_found(bench: Bench) -> Launched:
    return bench.start(bench.s3.environment, baseModel={"uri": bench.s3.uri("base/nowhere")})


def auth_denied(bench: Bench) -> Launched:
    environment = {**bench.s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    return bench.start(environment, publish={"store": bench.s3.uri("adapters")})


def internal(bench: Bench) -> Launched:
    pod = bench.start(training={"maxSteps": 500})
    pod.wait_step(2)
    os.kill(pod.workers[1], signal.SIGKILL)
    return pod


def gpu_out_of_memory(bench: Bench) -> Launched:
    return bench.start(entry="tests.trainer.entries:out_of_gpu_memory")


def gpu_says(phrase: str) -> tuple[Callable[[Bench], Launched], str]:
    """Training that raises what the row of the table with ``phrase`` says; and these words."""
    number = next(number for number, row in enumerate(GPU_ERRORS) if row.phrases[0] == phrase)
    entry = "tests.trainer.entries:fail_as_libraries_do"
    return lambda bench: bench.start({"GPU_ERROR": str(number)}, entry), phrase


def diverged(bench: Bench) -> Launched:
    broken = overflowing(bench.model, bench.tmp_path / "broken")
    return bench.start(baseModel={"uri": f"file://{broken}"}, dataset={"eval": None, "evalFraction": 0})


def peer_lost(bench: Bench) -> Launched:
    first, second = bench.start_pods({}, {}, training={"maxSteps": 500})
    first.wait_step(2)
    second.process.kill()
    return first


def store_unavailable(bench: Bench) -> Launched:
    environment = {
        **bench.s3.environment,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}",
        "LORA_STORE_RETRY_SECONDS": "1",
    }
    return bench.start(environment, publish={"store": bench.s3.uri("adapters")})


def checkpointed(bench: Bench) -> Launched:
    pod = bench.start(training={"maxSteps": 500})
    pod.wait_step(2)
    pod.process.send_signal(signal.SIGTERM)
    return pod


def gate_refused(bench: Bench) -> Launched:
    return bench.start(publish={"gate": {"maxEvalLoss": 0.0001}}, training={"maxSteps": 1})


def source_changed(bench: Bench) -> Launched:
    """The preflight of this run saw one row less."""
    rows = bench.tmp_path / "rows.jsonl"
    write_rows(rows, make_rows(20))
    source = DataSource(uri=f"file://{rows}")
    pins = Pins(train=pin_data(source, [rows]))
    write_rows(rows, make_rows(21))
    run = bench.make_run(**TWO, dataset={"train": {"uri": source.uri}, "eval": None})
    return bench.fork(run.model_copy(update={"pins": pins}))


def weights_changed(bench: Bench) -> Launched:
    return bench.start(entry="tests.trainer.entries:flipped_bit")


def disk_full(bench: Bench) -> Launched:
    uri = bench.s3.upload(bench.model, "base/too-large")
    return bench.start({**bench.s3.environment, "LORA_WORK": str(bench.full_disk)}, baseModel={"uri": uri})


PROVOCATIONS: dict[FailureClass, tuple[Callable[[Bench], Launched], str]] = {
    FailureClass.BAD_SPEC: (bad_spec, "lora.targetModules"),
    FailureClass.BAD_DATA: (bad_data, "bad.jsonl: record 4: completion: must be a string"),
    FailureClass.MODEL_NOT_FOUND: (model_not_found, "base/nowhere"),
    FailureClass.AUTH_DENIED: (auth_denied, "403"),
    FailureClass.INTERNAL: (internal, "ended by SIGKILL"),
    FailureClass.GPU_OUT_OF_MEMORY: (gpu_out_of_memory, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    FailureClass.DIVERGED: (diverged, "the 3rd time in a row"),
    FailureClass.PEER_LOST: (peer_lost, "rank 1 does not answer; it was last seen at the start of step"),
    FailureClass.STORE_UNAVAILABLE: (store_unavailable, "no success within 1 s"),
    FailureClass.CHECKPOINTED: (checkpointed, "is complete"),
    FailureClass.GATE_REFUSED: (gate_refused, "maxEvalLoss"),
    FailureClass.SOURCE_CHANGED: (source_changed, "dataset.train: file://"),
    FailureClass.WEIGHTS_CHANGED: (weights_changed, "model.layers.0.self_attn.q_proj of rank 1, as seen by rank 0, 1"),
    FailureClass.DISK_FULL: (disk_full, "No space left on device"),
    FailureClass.GPU_FAULT: gpu_says("uncorrectable ECC error encountered"),
    FailureClass.GPU_UNAVAILABLE: gpu_says("no CUDA-capable device is detected"),
    FailureClass.GPU_UNSUPPORTED: gpu_says("CUBLAS_STATUS_ARCH_MISMATCH"),
    FailureClass.GPU_KERNEL_FAILED: gpu_says("an illegal memory access was encountered"),
    FailureClass.LIMIT_TOO_LOW: gpu_says("Too many open files"),
}
"""How each row with an exit code is provoked, and what its message says."""

SAYS_MORE = {FailureClass.GPU_UNSUPPORTED, FailureClass.LIMIT_TOO_LOW, FailureClass.PEER_LOST}
"""Classes whose remedy depends on what was said (test_gpu_failures.py)."""


@pytest.mark.parametrize("rule", FAILURE_RULES, ids=lambda rule: rule.failure_class.value)
def test_each_row_of_the_failure_table_is_provoked(rule: FailureRule, bench: Bench) -> None:
    kind = rule.failure_class
    if rule.exit_code is None:
        tests = (Path(__file__).parents[1] / SEEN_BY_KUBERNETES[kind]).read_text()
        assert kind.value in tests or f"FailureClass.{kind.name}" in tests, f"{kind} is provoked nowhere"
        return
    provoke, words = PROVOCATIONS[kind]
    pod = provoke(bench)
    assert pod.wait(90) == rule.exit_code, pod.log.read_text()[-5000:]
    assert pod.words.failure_class == kind
    assert words in pod.words.message
    if kind not in SAYS_MORE:
        assert pod.words.remedy == rule.remedy
    if kind == FailureClass.GPU_OUT_OF_MEMORY:
        assert pod.words.micro_batch_size == 2, "what the operator would halve"


def test_no_provocation_is_for_a_row_that_is_gone() -> None:
    assert set(PROVOCATIONS) | set(SEEN_BY_KUBERNETES) == set(RULES)
    assert not set(PROVOCATIONS) & set(SEEN_BY_KUBERNETES)


# -- roots and echoes


def full_disk_there(bench: Bench) -> tuple[dict[str, str], dict[str, Any]]:
    uri = bench.s3.upload(bench.model, "base/too-large")
    return {"LORA_WORK": str(bench.full_disk)}, {"baseModel": {"uri": uri}}


def wrong_key_there(bench: Bench) -> tuple[dict[str, str], dict[str, Any]]:
    return {"AWS_SECRET_ACCESS_KEY": "wrong"}, {"baseModel": {"uri": bench.s3.upload(bench.model, "base/secret")}}


def dead_store_there(bench: Bench) -> tuple[dict[str, str], dict[str, Any]]:
    """Only rank 1's: each rank writes its random states itself."""
    dead = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
    changes = {
        "publish": {"store": bench.s3.uri("half-dead")},
        "checkpoint": {"everySteps": 1},
        "training": {"maxSteps": 500},
    }
    return dead, changes


ROOTS: dict[FailureClass, Callable[[Bench], tuple[dict[str, str], dict[str, Any]]]] = {
    FailureClass.DISK_FULL: full_disk_there,
    FailureClass.AUTH_DENIED: wrong_key_there,
}


@pytest.mark.parametrize("kind", ROOTS)
def test_a_fault_in_one_pod_is_told_from_its_echo_in_the_other(kind: FailureClass, bench: Bench) -> None:
    here, changes = ROOTS[kind](bench)
    first, second = bench.start_pods(bench.s3.environment, {**bench.s3.environment, **here}, **changes)
    assert second.wait(90) == RULES[kind].exit_code, second.log.read_text()[-5000:]
    assert (second.words.failure_class, second.words.rank) == (kind, 1)
    assert first.wait(30) in {RULES[echo].exit_code for echo in ECHOES}, first.log.read_text()[-5000:]
    assert first.words.failure_class in ECHOES
    assert "rank 1" in first.words.message


def test_a_store_that_is_down_for_one_pod_ends_both_with_what_it_said(bench: Bench) -> None:
    here, changes = dead_store_there(bench)
    impatient = {**bench.s3.environment, "LORA_STORE_RETRY_SECONDS": "1"}
    first, second = bench.start_pods(impatient, {**impatient, **here}, **changes)
    for pod in (first, second):
        assert pod.wait(90) == 74, pod.log.read_text()[-5000:]
        assert "3 checkpoints in a row could not be saved; there is none yet" in pod.words.message


# -- steps that are not finite


def overflowing(model: Path, directory: Path) -> Path:
    """A model whose every answer overflows."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def poisoned(model: Path, directory: Path) -> Path:
    """A model in which one token, "~", overflows."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(directory / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embeddings.clone()
    (token,) = AutoTokenizer.from_pretrained(directory)("~", add_special_tokens=False)["input_ids"]
    embeddings[token] = torch.inf
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def rates(pod: Launched) -> dict[int, float]:
    return {line.step: line.learning_rate or 0.0 for line in pod.lines if line.event == "step" and line.step}


def test_a_record_that_overflows_costs_its_step_and_nothing_else(bench: Bench) -> None:
    """On the rank that has it and on the other; also when the run is stopped right after it."""
    rows = make_rows(16)
    rows[5]["prompt"] += "~"
    train = write_rows(bench.tmp_path / "train.jsonl", rows)
    changes: dict[str, Any] = {
        "baseModel": {"uri": f"file://{poisoned(bench.model, bench.tmp_path / 'poisoned')}"},
        "dataset": {"train": {"uri": f"file://{train}"}},
        "training": {"maxSteps": 6, "globalBatchSize": 4, "scheduler": "linear", "warmupRatio": 0},
        "checkpoint": {"everySteps": 1},
    }
    whole = bench.start(**changes, uid="whole", publish={"store": f"file://{bench.tmp_path}/whole"})
    assert whole.wait() == 0, whole.log.read_text()[-5000:]
    lines = [line for line in whole.lines if line.event == "step"]
    skipped = [line.step for line in lines if line.loss is None]
    assert skipped
    assert lines[-1].skipped_steps == len(skipped)
    assert whole.log.read_text().count("no weight was changed") == len(skipped)
    found = rates(whole)
    for step in range(1, 6):  # the rate moves on after a step that was taken, and only then
        assert (found[step + 1] < found[step]) == (step not in skipped)

    run = bench.make_run(**TWO, **changes, uid="cut")
    cut = bench.fork(run)
    cut.wait_step(skipped[0])
    cut.process.kill()
    cut.process.wait()
    again = bench.fork(run.model_copy(update={"attempt": 2}))
    assert again.wait() == 0, again.log.read_text()[-5000:]
    assert again.words.adapter is not None
    assert whole.words.adapter is not None
    assert again.words.adapter.digest == whole.words.adapter.digest
    last = [line for line in again.lines if line.event == "step"][-1]
    assert last.skipped_steps == len(skipped)
    for adapter in (whole.words.adapter, again.words.adapter):
        report = Path(adapter.uri.removeprefix("file://"), "report.html").read_text()
        assert re.search(rf"Steps skipped[^<]*</t[hd]><t[hd][^>]*>{len(skipped)}<", report)


def test_weights_that_overflow_later_end_the_run_and_keep_the_last_checkpoint(bench: Bench) -> None:
    """Every record from the second epoch's point of view: three bad steps in a row after one good checkpoint."""
    rows = make_rows(16)
    for row in rows:
        row["prompt"] += "~"
    train = write_rows(bench.tmp_path / "train.jsonl", rows)
    run = bench.make_run(
        **TWO,
        baseModel={"uri": f"file://{poisoned(bench.model, bench.tmp_path / 'poisoned')}"},
        dataset={"train": {"uri": f"file://{train}"}},
        training={"maxSteps": 6, "globalBatchSize": 4},
        checkpoint={"everySteps": 1},
    )
    pod = bench.fork(run)
    assert pod.wait() == 72, pod.log.read_text()[-5000:]
    assert "step 3" in pod.words.message
    store = Path(run.publish.store.removeprefix("file://"))
    assert sorted(path.parent.name for path in store.rglob("COMPLETE.json")) == ["step-1", "step-2"]

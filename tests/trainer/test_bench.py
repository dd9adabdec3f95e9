"""The benchmarks themselves, small, on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from bench import trainer as bench_trainer
from bench.gpu import parts
from bench.gpu.__main__ import LIMIT_SECONDS, PARTS
from bench.gpu.__main__ import main as bench_gpu
from bench.gpu.models import random_base_model, write_model
from bench.gpu.parts import CONFIGS, LEVERS, TINY_LEVERS, Case, Machine, utilization
from bench.gpu.worker import Probe
from lora_api.run import RunSpec
from lora_api.training import Quantization
from lora_trainer.fitting import build_job
from lora_trainer.memory import plan_memory
from lora_trainer.modelshape import read_shape
from lora_trainer.rules import check_run
from lora_trainer.speed import read_levers


def test_the_comparison_with_plain_trl_runs_both_sides_and_writes_its_table(tmp_path: Path) -> None:
    assert bench_trainer.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "trainer.json").read_text())
    assert [side["side"] for side in result["sides"]] == ["plain TRL", "this trainer", "this trainer, packing"]
    plain, ours, _ = result["sides"]
    assert plain["ratioMinMedianMax"]["tokensPerSecond"] == [1.0, 1.0, 1.0]
    assert all(side["tokensPerSecond"] > 0 and side["peakMiB"] > 200 for side in result["sides"])
    assert 0.3 < result["job"]["supervisedShare"] < 0.7
    # A vocabulary of 8,192 over a hidden size of 64 is mostly head: half of its tokens is a wide margin.
    assert ours["ratioMinMedianMax"]["tokensPerCpuSecond"][1] > 1.0
    assert bench_trainer.to_markdown(result) == (tmp_path / "trainer.md").read_text()


def test_the_gpu_benchmark_runs_on_a_cpu_but_for_cuda_itself(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tiny", "--parts", "parity", "outOfMemory", "levers", "--out", str(tmp_path)]
    assert bench_gpu(options) == 1, "the part that needs CUDA says so"
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["outOfMemory"] == {"out of memory": {"failed": "needs CUDA"}}
    alone = result["parity"]["one process, packed as float32"]
    two = result["parity"]["FSDP, two processes, packed as float32"]
    assert len(alone["losses"]) == len(two["losses"]) == 3
    assert two["equal"]
    assert two["largestLogitDifference"] < 1e-4
    assert two["largestLossDifference"] < 1e-4
    assert list(result["levers"]) == list(TINY_LEVERS)
    assert all(row["tokensPerSecondPerGpu"] > 0 and row["attention"] == "sdpa" for row in result["levers"].values())


def test_parity_that_does_not_hold_fails_the_benchmark_and_ends_no_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "PARITY_TOLERANCE", -1.0)
    options = ["--device", "cpu", "--tiny", "--parts", "parity", "speed", "--out", str(tmp_path)]
    assert bench_gpu(options) == 1
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert len(result["parity"]) == 2
    assert all(not row["equal"] and "differs" in row["failed"] for row in result["parity"].values())
    assert result["speed"]["as trained"]["tokensPerSecondPerGpu"] > 0


def test_ranks_that_share_a_gpu_share_no_directory(tmp_path: Path) -> None:
    case = parts.Case("two", model="tiny", sequence=64, micro_batch=1, steps=1, processes=2, limit=60)
    _, environments, _ = parts.prepare_case(Machine("cpu", tiny=True, directory=tmp_path, deadline=0), case)
    assert [env["RANK"] for env in environments] == ["0", "1"]
    for name in ("LORA_STATE_DIR", "LORA_WORK"):
        assert len({env[name] for env in environments}) == 2


def test_the_parts_of_the_gpu_benchmark_have_their_time() -> None:
    assert list(PARTS) == ["facts", "parity", "packing", "speed", "large", "outOfMemory", "levers"]
    runs = {"parity": 3, "packing": 1, "speed": 1, "large": 1, "outOfMemory": 1}
    others = sum(parts.RUN_SECONDS[part] * count for part, count in runs.items())
    assert others + len(parts.LEVERS) * parts.ENDED_IN_TIME <= LIMIT_SECONDS <= 9 * 60


@pytest.mark.parametrize("name", LEVERS)
def test_every_lever_is_a_run_that_the_trainer_takes(name: str, tmp_path: Path) -> None:
    size = {"model": "llama-3-8b, 8 layers", "sequence": 4096, "micro_batch": 2, "steps": 5, "limit": 9}
    case = Case(**{"name": "lever", **size, **LEVERS[name]})
    run = RunSpec.model_validate(case.run(Machine("cuda", tiny=False, directory=tmp_path, deadline=0), tmp_path))
    check_run(run)
    read_levers({"LORA_SPEED": case.speed})
    Probe(tmp_path, **case.probe)
    assert plan_memory(build_job(run, read_shape(CONFIGS[case.model]))).safe < 79


def test_a_gpu_benchmark_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu(["--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_random_weights_take_the_place_of_loaded_ones(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", "tiny")
    first, second = (random_base_model(directory, Quantization(), torch.device("cpu")) for _ in range(2))
    kinds = {type(module).__name__ for module in first.modules()}
    assert "Linear4bit" in kinds
    assert first.is_loaded_in_4bit
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in first.parameters())
    assert not any(buffer.is_meta for buffer in first.buffers())
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        logits, again = first(input_ids=ids).logits, second(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, again), "all ranks make the same weights"


def test_utilization_counts_the_published_size_of_the_model() -> None:
    shape = read_shape(CONFIGS["llama-3-8b"])
    assert shape.total_weights == 8_030_261_248
    assert read_shape(CONFIGS["llama-3-70b"]).total_weights == 70_553_706_496
    found = utilization("NVIDIA H100 80GB HBM3", 9000, shape, checkpointing=True)
    assert found == {"mfu": 0.438, "peakFlops": 989e12}
    assert utilization("another GPU", 9000, shape, checkpointing=True) == {}

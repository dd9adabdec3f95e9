"""The parts of the GPU benchmark: what each runs, and what it makes of the results. Each is a run of the trainer."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu.models import CONFIGS, write_model, write_records
from bench.watch import BenchError, Watched, watch
from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec, plan_batch
from lora_trainer.memory import Job, plan_memory
from lora_trainer.modelshape import ModelShape, read_shape
from lora_trainer.speed import SPEED_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
ENDED_IN_TIME = 10.0
"""Seconds that a part needs at least; with less left it is not begun."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by NVIDIA's data sheets (SXM where there are several), by a part of the GPU's name."""

PARITY_TOLERANCE = 0.02
"""Largest difference of a logit, in parts of the largest logit, and of a loss in nats: bfloat16 has 8 bits."""


@dataclass(frozen=True)
class Machine:
    """What the benchmark runs on. ``tiny`` takes small models, for trials without a GPU."""

    device: str
    tiny: bool
    directory: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the whole benchmark ends."""
        return self.deadline - time.monotonic()

    def limit(self, seconds: float) -> float:
        """Limit of one run, which takes ``seconds`` at most on a GPU. On CPUs only the whole has a limit."""
        return max(1.0, min(seconds, self.left) if self.on_gpu else self.left)


@dataclass(frozen=True)
class Case:
    """One run of the trainer."""

    name: str
    model: str
    sequence: int
    micro_batch: int
    steps: int
    processes: int = 1
    speed: str = ""
    gradient_checkpointing: bool = True
    probe: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 120.0

    def run(self, machine: Machine, directory: Path) -> dict[str, Any]:
        """The run document. Text records ask no questions, so that nothing is generated."""
        return {
            "namespace": "bench",
            "name": "gpu",
            "uid": "bench",
            "baseModel": {"uri": f"file://{directory}/model"},
            "dataset": {
                "train": {"uri": f"file://{directory}/train.jsonl"},
                "evalFraction": 0.0,
                "maxSeqLength": self.sequence,
            },
            "lora": {"r": 16, "alpha": 32},
            "training": {
                "maxSteps": self.steps,
                "learningRate": 0.0002,
                "scheduler": "constant",
                "warmupRatio": 0,
                "globalBatchSize": self.micro_batch * 2,
                "microBatchSize": self.micro_batch * 2 // self.processes,
                "gradientCheckpointing": self.gradient_checkpointing,
            },
            "parallelism": {"nodes": 1 if machine.on_gpu else self.processes}
            | {"gpusPerNode": self.processes if machine.on_gpu else 0},
            "checkpoint": {"everySteps": 1000},
            "publish": {"store": f"file://{directory}/store"},
        }


@dataclass(frozen=True)
class Done:
    """A run that ended well: its speed from outside, and what the probe wrote."""

    watched: Watched
    measured: dict[str, Any]
    logits: torch.Tensor | None


def run_case(machine: Machine, case: Case) -> Done:
    """Runs ``case``, all its processes.

    Raises:
        BenchError: it failed or took too long; the end of its output is in the message.
    """
    command, env, directory = prepare_case(machine, case)
    others = [
        subprocess.Popen(
            command, env={**os.environ, **env, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for rank in range(1, case.processes)
    ]
    try:
        watched = watch(command, env, directory / "log", machine.limit(case.limit))
    finally:
        for other in others:
            other.kill()
            other.wait()
    measured = json.loads((directory / "measured.json").read_text())
    logits = directory / "logits.pt"
    return Done(watched, measured, torch.load(logits, weights_only=True) if logits.exists() else None)


def prepare_case(machine: Machine, case: Case) -> tuple[list[str], dict[str, str], Path]:
    """Writes what ``case`` needs. Returns the command of one process, its environment as rank 0, and the directory."""
    directory = machine.directory / case.name
    write_model(directory / "model", case.model)
    run = case.run(machine, directory)
    write_records(directory / "train.jsonl", run["training"]["globalBatchSize"] * 2, case.sequence)
    (directory / "run.json").write_text(json.dumps(run))
    probe = {"result": f"{directory}/measured.json", **case.probe}
    if probe.pop("keep_logits", False):
        probe["logits"] = f"{directory}/logits.pt"
    (directory / "probe.json").write_text(json.dumps(probe))
    env = {
        SPEED_VARIABLE: case.speed,
        "PYTHONPATH": os.pathsep.join([*(str(ROOT / name) for name in ("crds", "trainer_image", "")), *sys.path[1:]]),
        "LORA_STATE_DIR": f"{directory}/state",
        "LORA_WORK": f"{directory}/work",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    if case.processes > 1:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        env |= {"WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes)}
    command = [sys.executable, "-m", "bench.gpu.worker", f"{directory}/run.json", f"{directory}/probe.json"]
    return command, env, directory


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# -- (a) parity


def parity(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """The same logits and losses with and without FSDP, and with each type that packs NF4 weights.

    FSDP2 has been seen to corrupt packed weights on CUDA (bitsandbytes#1945, pytorch#159333).
    """
    size = {"model": "tiny" if machine.tiny else "small", "sequence": 64 if machine.tiny else 512}
    size |= {"micro_batch": 1, "steps": 3, "limit": 90.0}
    stored = ("bfloat16", "float32") if machine.on_gpu else ("float32",)
    for storage in stored:
        probe = {"storage": storage, "keep_logits": True}
        alone = None
        cases: list[tuple[str, dict[str, Any], int]] = [
            ("one process", {}, 1),
            ("FSDP, two processes", {"one_gpu": True}, 2),
        ]
        for name, more, processes in cases:
            case = Case(f"parity-{storage}-{len(more)}-{processes}", processes=processes, probe=probe | more, **size)
            try:
                done = run_case(machine, case)
            except BenchError as error:
                report(f"{name}, packed as {storage}", {"failed": str(error)[-600:]})
                continue
            alone = alone or done
            report(f"{name}, packed as {storage}", compare(alone, done))


def compare(alone: Done, other: Done) -> dict[str, Any]:
    """Differences of ``other`` from a run of one process without FSDP."""
    assert alone.logits is not None and other.logits is not None  # noqa: PT018 - both were asked for
    logits = float((other.logits - alone.logits).abs().max() / alone.logits.abs().max())
    pairs = zip(alone.measured["losses"], other.measured["losses"], strict=True)
    losses = max(abs(left - right) for left, right in pairs)
    equal = logits <= PARITY_TOLERANCE and losses <= PARITY_TOLERANCE
    return {
        "largestLogitDifference": logits,
        "largestLossDifference": losses,
        "losses": other.measured["losses"],
        "equal": equal,
    }


# -- (b) speed, (c) size

LEVERS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "TRL's loss": {"speed": "no-summed-loss"},
    "Liger's kernels": {"speed": "liger"},
    "layers compiled": {"speed": "compile", "limit": 110.0},
    "batches not made ahead": {"speed": "no-prefetch"},
    "AdamW not fused": {"speed": "no-fused-optimizer"},
    "no gradient checkpointing": {"gradient_checkpointing": False, "micro_batch": 1},
}
"""What each row changes; one lever at a time."""


def speed(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """QLoRA of an 8B model at sequences of 4096 tokens, each lever on and off."""
    size = {"model": "tiny", "sequence": 64} if machine.tiny else {"model": "llama-3-8b", "sequence": 4096}
    levers = dict(list(LEVERS.items())[:2]) if machine.tiny else LEVERS
    for number, (name, change) in enumerate(levers.items()):
        case = Case(**{"name": f"speed-{number}", "micro_batch": 2, "steps": 6, "limit": 75.0, **size, **change})
        _measure(machine, case, name, report)


def large(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """A 70B model in NF4 on one GPU."""
    size = {"model": "tiny", "sequence": 64} if machine.tiny else {"model": "llama-3-70b", "sequence": 2048}
    _measure(machine, Case("large", micro_batch=1, steps=3, limit=150.0, **size), "70B on one GPU", report)


def _measure(machine: Machine, case: Case, name: str, report: Callable[[str, dict[str, Any]], None]) -> None:
    if machine.left < ENDED_IN_TIME:
        report(name, {"failed": "no time was left"})
        return
    try:
        done = run_case(machine, case)
    except BenchError as error:
        report(name, {"failed": str(error)[-600:]})
        return
    spec = RunSpec.model_validate(case.run(machine, machine.directory / case.name))
    shape = read_shape(CONFIGS[case.model])
    plan = plan_memory(
        Job(
            shape,
            spec.lora,
            spec.quantization,
            plan_batch(spec.training, spec.parallelism).micro_batch_size,
            case.sequence,
            gradient_checkpointing=case.gradient_checkpointing,
        )
    )
    rate = done.watched.tokens_per_second
    result: dict[str, Any] = {"tokensPerSecondPerGpu": round(rate, 1), "losses": done.measured["losses"]}
    if machine.on_gpu:
        gpu = torch.cuda.get_device_name()
        result |= utilization(gpu, rate, shape, checkpointing=case.gradient_checkpointing)
        result |= {"plannedGiB": round(plan.allocated, 2), "measuredGiB": round(done.measured["allocatedGiB"], 2)}
        result |= {"plannedReservedGiB": round(plan.reserved, 2), "reservedGiB": round(done.measured["reservedGiB"], 2)}
    report(name, result)


def utilization(gpu: str, tokens_per_second: float, shape: ModelShape, *, checkpointing: bool) -> dict[str, Any]:
    """Model FLOPs utilization: 4N FLOP a token (forward, and backward without the base's gradients), 2N recomputed.

    N is the number of the base's weights. Empty for a GPU whose peak is not in PEAK_FLOPS.
    """
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    if peak is None:
        return {}
    per_token = (6 if checkpointing else 4) * shape.total_weights
    return {"mfu": round(tokens_per_second * per_token / peak, 3), "peakFlops": peak}


# -- (d) out of memory


def out_of_memory(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """A run that CUDA refuses memory ends with the exit code of GPUOutOfMemory."""
    if not machine.on_gpu:
        report("out of memory", {"failed": "needs CUDA"})
        return
    probe = {"leave_bytes": 700 * 2**20}
    case = Case(
        "memory", model="small", sequence=4096, micro_batch=8, steps=2, gradient_checkpointing=False, probe=probe
    )
    command, env, directory = prepare_case(machine, case)
    with (directory / "log").open("w") as log:
        limit = machine.limit(case.limit)
        try:
            code = subprocess.run(command, env={**os.environ, **env}, stdout=log, stderr=log, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            report("out of memory", {"failed": f"not ended after {limit:.0f} s"})
            return
    want = RULES[FailureClass.GPU_OUT_OF_MEMORY].exit_code
    report("out of memory", {"exitCode": code, "classified": code == want})

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

from bench.gpu.facts import FACTS
from bench.gpu.models import CONFIGS, write_model, write_records
from bench.watch import BenchError, Watched, watch
from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec
from lora_trainer.architecture import installed_flash_attention
from lora_trainer.fitting import build_job
from lora_trainer.memory import plan_memory
from lora_trainer.modelshape import ModelShape, read_shape
from lora_trainer.speed import SPEED_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
ENDED_IN_TIME = 10.0
"""Seconds that a part needs at least; with less left it is not begun."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by NVIDIA's data sheets (SXM where there are several), by a part of the GPU's name."""

RUN_SECONDS = {"parity": 45.0, "packing": 20.0, "speed": 75.0, "large": 130.0, "outOfMemory": 45.0}
"""Limit of one run on a GPU, by part. The levers have no limit of their own: they share what the others leave."""

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
    """One run of the trainer. Records have ``record`` tokens, or more than ``sequence``; ``limit`` is in seconds."""

    name: str
    model: str
    sequence: int
    micro_batch: int
    steps: int
    limit: float
    processes: int = 1
    record: int | None = None
    speed: str = ""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)

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
                **self.dataset,
            },
            "lora": {"r": 16, "alpha": 32},
            "training": {
                "maxSteps": self.steps,
                "learningRate": 0.0002,
                "scheduler": "constant",
                "warmupRatio": 0,
                "globalBatchSize": self.micro_batch * 2,
                "microBatchSize": self.micro_batch * 2 // self.processes,
                "gradientCheckpointing": True,
                **self.training,
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
    command, environments, directory = prepare_case(machine, case)
    first, *rest = environments
    others = [
        subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for env in rest
    ]
    try:
        watched = watch(command, first, directory / "log", machine.limit(case.limit))
    finally:
        for other in others:
            other.kill()
            other.wait()
    measured = json.loads((directory / "measured.json").read_text())
    logits = directory / "logits.pt"
    return Done(watched, measured, torch.load(logits, weights_only=True) if logits.exists() else None)


def prepare_case(machine: Machine, case: Case) -> tuple[list[str], list[dict[str, str]], Path]:
    """Writes what ``case`` needs. Returns the command of a process, the environment of each rank, and the directory."""
    directory = machine.directory / case.name
    write_model(directory / "model", case.model)
    run = case.run(machine, directory)
    tokens = case.record or case.sequence
    sequences = run["training"]["globalBatchSize"] * 2
    write_records(directory / "train.jsonl", sequences * case.sequence // tokens, tokens)
    (directory / "run.json").write_text(json.dumps(run))
    probe = {"result": f"{directory}/measured.json", **case.probe}
    if probe.pop("keep_logits", False):
        probe["logits"] = f"{directory}/logits.pt"
    (directory / "probe.json").write_text(json.dumps(probe))
    env = {
        SPEED_VARIABLE: case.speed,
        "PYTHONPATH": os.pathsep.join([*(str(ROOT / name) for name in ("crds", "trainer_image", "")), *sys.path[1:]]),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    if case.processes > 1:  # one process alone must not look distributed
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "LOCAL_RANK": "0"}
        env |= {"WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes)}
    command = [sys.executable, "-m", "bench.gpu.worker", f"{directory}/run.json", f"{directory}/probe.json"]
    return command, [env | _rank(case, directory, rank) for rank in range(case.processes)], directory


def _rank(case: Case, directory: Path, rank: int) -> dict[str, str]:
    """Every rank is the first of its pod: it takes GPU 0, and fetches its files itself into directories of its own."""
    place = {"LORA_STATE_DIR": f"{directory}/state-{rank}", "LORA_WORK": f"{directory}/work-{rank}"}
    return place | ({"RANK": str(rank)} if case.processes > 1 else {})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# -- what the tests take for true


def facts(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """Each fact that the tests emulate of a GPU, asked of this one (docs/decisions/035)."""
    if not machine.on_gpu:
        report("facts", {"notAsked": "they are of GPUs; tests/gputypes asks them of the emulation"})
        return
    for name, ask in FACTS.items():
        answer = ask(torch.device("cuda", 0))
        failed = {} if answer.holds else {"failed": "the tests emulate a GPU otherwise: tests/support/gputypes.py"}
        report(name, {"asEmulated": answer.holds, "figure": answer.figure, **failed})


# -- (a) parity


def parity(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """The same logits and losses with FSDP as without it, with each type that packs NF4 weights.

    FSDP2 has been seen to corrupt packed weights on CUDA (bitsandbytes#1945, pytorch#159333).
    """
    size = {"model": "tiny" if machine.tiny else "small", "sequence": 64 if machine.tiny else 512}
    size |= {"micro_batch": 1, "steps": 3, "limit": RUN_SECONDS["parity"]}
    stored = ("bfloat16", "float32") if machine.on_gpu else ("float32",)
    alone = None
    cases = [("one process", stored[0], 1), *(("FSDP, two processes", storage, 2) for storage in stored)]
    for name, storage, processes in cases:
        probe = {"storage": storage, "keep_logits": True, "one_gpu": processes > 1}
        case = Case(f"parity-{storage}-{processes}", processes=processes, probe=probe, **size)
        name = f"{name}, packed as {storage}"
        try:
            done = run_case(machine, case)
        except BenchError as error:
            report(name, {"failed": str(error)[-600:]})
            if alone is None:
                return
            continue
        alone = alone or done
        report(name, compare(alone, done))


def compare(alone: Done, other: Done) -> dict[str, Any]:
    """Differences of ``other`` from a run of one process without FSDP."""
    assert alone.logits is not None and other.logits is not None  # noqa: PT018 - both were asked for
    logits = float((other.logits - alone.logits).abs().max() / alone.logits.abs().max())
    pairs = zip(alone.measured["losses"], other.measured["losses"], strict=True)
    losses = max(abs(left - right) for left, right in pairs)
    equal = logits <= PARITY_TOLERANCE and losses <= PARITY_TOLERANCE
    found: dict[str, Any] = {
        "largestLogitDifference": logits,
        "largestLossDifference": losses,
        "losses": other.measured["losses"],
        "equal": equal,
    }
    return found if equal else found | {"failed": f"differs by more than {PARITY_TOLERANCE}: is FSDP right here?"}


# -- (b) speed, (c) size, (e) levers


def speed(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """QLoRA of an 8B model at sequences of 4096 tokens, as it is trained by default."""
    size = {"model": "tiny", "sequence": 64} if machine.tiny else {"model": "llama-3-8b", "sequence": 4096}
    _measure(machine, Case("speed", micro_batch=2, steps=6, limit=RUN_SECONDS["speed"], **size), "as trained", report)


def large(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """A 70B model in NF4 on one GPU."""
    size = {"model": "tiny", "sequence": 64} if machine.tiny else {"model": "llama-3-70b", "sequence": 2048}
    _measure(
        machine, Case("large", micro_batch=1, steps=3, limit=RUN_SECONDS["large"], **size), "70B on one GPU", report
    )


SHORT = {"record": 500}
LEVERS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "records of 500 tokens": SHORT,
    "records of 500 tokens, packed": {**SHORT, "dataset": {"packing": True}},
    "TRL's loss": {"speed": "no-summed-loss"},
    "attention by SDPA": {"probe": {"attention": "sdpa"}},
    "Liger's kernels": {"speed": "liger"},
    "no gradient checkpointing": {"training": {"gradientCheckpointing": False}},
    "paged 8-bit AdamW": {"training": {"optimizer": "paged-adamw-8bit"}},
    "AdamW not fused": {"speed": "no-fused-optimizer"},
    "batches not made ahead": {"speed": "no-prefetch"},
    "batches not in pinned memory": {"speed": "no-pinned-memory"},
    "layers compiled": {"speed": "compile"},
}
"""What each row changes; one lever at a time. Compiling takes longest, so it gets what time is left."""

TINY_LEVERS = ("as trained", "records of 500 tokens, packed", "TRL's loss")
"""Those that are tried without a GPU."""


def levers(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """Each lever switched, on some layers of the 8B model. The time that is left is shared by the rows to come."""
    size = {"model": "tiny", "sequence": 1024} if machine.tiny else {"model": "llama-3-8b, 8 layers", "sequence": 4096}
    rows = {name: LEVERS[name] for name in (TINY_LEVERS if machine.tiny else LEVERS)}
    if machine.on_gpu and not installed_flash_attention():
        del rows["attention by SDPA"]
        report("attention by FlashAttention", {"notInstalled": "SDPA is what all rows are measured with"})
    for number, (name, change) in enumerate(rows.items()):
        limit = machine.left / (len(rows) - number)
        case = Case(**{"name": f"lever-{number}", "micro_batch": 2, "steps": 5, "limit": limit, **size, **change})
        _measure(machine, case, name, report)


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
    plan = plan_memory(build_job(spec, shape, longest=case.record))
    rate = done.watched.tokens_per_second
    result: dict[str, Any] = {"tokensPerSecondPerGpu": round(rate, 1), "attention": done.measured["attention"]}
    result["losses"] = done.measured["losses"]
    if machine.on_gpu:
        gpu = torch.cuda.get_device_name()
        result |= utilization(gpu, rate, shape, checkpointing=spec.training.gradient_checkpointing)
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
        "memory",
        model="small",
        sequence=4096,
        micro_batch=8,
        steps=2,
        training={"gradientCheckpointing": False},
        probe=probe,
        limit=RUN_SECONDS["outOfMemory"],
    )
    command, (env,), directory = prepare_case(machine, case)
    with (directory / "log").open("w") as log:
        limit = machine.limit(case.limit)
        try:
            code = subprocess.run(command, env={**os.environ, **env}, stdout=log, stderr=log, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            report("out of memory", {"failed": f"not ended after {limit:.0f} s"})
            return
    want = RULES[FailureClass.GPU_OUT_OF_MEMORY].exit_code
    failed = {} if code == want else {"failed": f"exit code {code}, and {want} is GPUOutOfMemory's"}
    report("out of memory", {"exitCode": code, "classified": code == want, **failed})

"""``make bench-trainer``: this trainer against plain TRL and PEFT, the same job on the same machine in one go.

The job is the demo's: SmolLM2-135M-Instruct in NF4, an adapter of rank 8 on all linear layers, the demo's tickets.
The programs take turns, and each is measured from outside (``watch``). One thread a process.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.watch import Watched, watch
from demo.tickets import write_tickets
from lora_trainer.speed import SPEED_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("LORA_CACHE", Path.home() / ".cache" / "lora-operator"))
RESULTS = ROOT / "docs" / "benchmarks"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
RANK, ALPHA, RATE, SEED = 8, 16, 0.002, 42
RUN_LIMIT = 300.0


@dataclass(frozen=True)
class Size:
    """How much is done. ``steps`` are optimizer steps of ``global_batch`` sequences of at most ``length`` tokens."""

    model: Callable[[Path], Path]
    records: int
    steps: int
    rounds: int
    rounds_of_two: int
    global_batch: int = 8
    micro_batch: int = 4
    length: int = 256


@dataclass(frozen=True)
class Side:
    """One program in one setting."""

    name: str
    ours: bool
    processes: int = 1
    packing: bool = False
    strategy: str = "auto"
    speed: str = ""
    """LORA_SPEED"""


PLAIN, OURS = Side("plain TRL", ours=False), Side("this trainer", ours=True)
PACKED = Side("this trainer, packing", ours=True, packing=True)
PLAIN_TWO = Side("plain TRL (DDP)", ours=False, processes=2)
OURS_TWO = Side("this trainer (DDP)", ours=True, processes=2, strategy="ddp")
SHARDED = Side("this trainer (FSDP2)", ours=True, processes=2, strategy="fsdp")

AIMS = (
    (OURS, "tokensPerSecond", ">=", 1.0),
    (OURS, "peakMiB", "<=", 1.0),
    (OURS, "firstStepSeconds", "<=", 1.0),
    (PACKED, "tokensPerSecond", ">=", 1.3),
)
"""What is to hold against plain TRL: ratios of medians, as ``missed_aims`` reads them."""

LEARNED_TOLERANCE = 0.25
"""Share by which the fall of the loss may differ: adapters begin with other numbers."""


def demo_model(directory: Path) -> Path:
    """SmolLM2-135M-Instruct, made once and kept in the cache."""
    from demo.model import make_model

    target = CACHE / "models" / "smollm2-135m-instruct"
    make_model(target)
    return target


def small_model(directory: Path) -> Path:
    """A random Llama for quick runs: 2 layers and a vocabulary of 8,192, with a tokenizer made of the tickets."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from demo.tickets import make_tickets

    texts = [row["prompt"] + row["completion"] for row in make_tickets(100, 7)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=8192, **shape, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(directory)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(directory)  # noqa: SLF001
    return directory


FULL = Size(demo_model, records=144, steps=3, rounds=2, rounds_of_two=1)
QUICK = Size(small_model, records=64, steps=3, rounds=1, rounds_of_two=0)


def plain_job(size: Size, side: Side, model: Path, data: Path, output: Path) -> dict[str, Any]:
    """The document of ``plain_trl.py``."""
    return {
        "model": str(model),
        "train": str(data / "train.jsonl"),
        "eval": str(data / "eval.jsonl"),
        "output": str(output),
        "steps": size.steps,
        "micro_batch": size.micro_batch,
        "accumulation": size.global_batch // size.micro_batch // side.processes,
        "max_length": size.length,
        "learning_rate": RATE,
        "rank": RANK,
        "alpha": ALPHA,
        "seed": SEED,
    }


def our_run(size: Size, side: Side, model: Path, data: Path, output: Path) -> dict[str, Any]:
    """The run document of the same job."""
    return {
        "namespace": "bench",
        "name": "tickets",
        "uid": "bench",
        "baseModel": {"uri": f"file://{model}"},
        "dataset": {
            "train": {"uri": f"file://{data}/train.jsonl"},
            "eval": {"uri": f"file://{data}/eval.jsonl"},
            "maxSeqLength": size.length,
            "packing": side.packing,
        },
        "lora": {"r": RANK, "alpha": ALPHA},
        "training": {
            "maxSteps": size.steps,
            "learningRate": RATE,
            "scheduler": "constant",
            "warmupRatio": 0,
            "globalBatchSize": size.global_batch,
            "microBatchSize": size.micro_batch,
            "gradientCheckpointing": False,
            "seed": SEED,
        },
        "parallelism": {"nodes": side.processes, "gpusPerNode": 0, "strategy": side.strategy},
        "checkpoint": {"everySteps": 1000},
        "publish": {"store": f"file://{output}/store"},
    }


def run_side(size: Size, side: Side, model: Path, data: Path, output: Path) -> Watched:
    """Runs one side once."""
    output.mkdir(parents=True)
    document = output / "job.json"
    build = our_run if side.ours else plain_job
    document.write_text(json.dumps(build(size, side, model, data, output)))
    if side.ours:
        command = [sys.executable, "-m", "lora_trainer", "launch", str(document)]
    else:
        script = [str(ROOT / "bench" / "plain_trl.py"), str(document)]
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={side.processes}"]
        command = [sys.executable, *(torchrun if side.processes > 1 else []), *script]
    env = {
        SPEED_VARIABLE: side.speed,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "HF_HOME": str(output / "hf"),
        "LORA_WORK": str(output / "work"),
        "LORA_TERMINATION_LOG": str(output / "words.json"),
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("crds", "trainer_image", "")),
    }
    return watch(command, env, output / "log", RUN_LIMIT)


def supervised_share(model: Path, data: Path) -> float:
    """Share of the tokens of the records that are learned from: completion and end, by TRL's tokenization."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    whole = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    return 1 - sum(prompts) / sum(whole)


def turns(size: Size, levers: Sequence[str] = ()) -> list[Side]:
    """Who runs when. With ``levers``: this trainer as it is, and with each of them switched."""
    if levers:
        switched = [Side(f"this trainer, {lever}", ours=True, speed=lever) for lever in levers]
        return [OURS, *switched] * size.rounds
    return [PLAIN, OURS, PACKED] * size.rounds + [PLAIN_TWO, OURS_TWO, SHARDED] * size.rounds_of_two


def compare(
    size: Size, directory: Path, say: Callable[[str], None] = print, order: Sequence[Side] | None = None
) -> dict[str, Any]:
    """Runs all sides in turn, as ``turns`` has it. Returns what is written to trainer.json."""
    began = time.monotonic()
    data = directory / "data"
    write_tickets(data, size.records, 8, seed=7)
    model = size.model(directory / "model")
    runs: dict[Side, list[Watched]] = {}
    for number, side in enumerate(order or turns(size)):
        done = run_side(size, side, model, data, directory / f"{number}")
        runs.setdefault(side, []).append(done)
        say(
            f"{side.name}: {done.tokens_per_second:.1f} tokens/s, {done.tokens_per_cpu_second:.1f} by processor time, "
            f"{done.peak_mib:.0f} MiB, first step after {done.first_step_seconds:.1f} s, "
            f"last loss {done.steps[-1].loss:.4f}"
        )
    share = supervised_share(model, data)
    sides = [_summary(side, watched, runs, share) for side, watched in runs.items()]
    return {
        "job": {"model": model.name, "records": size.records, "steps": size.steps, "globalBatchSize": size.global_batch}
        | {"microBatchSize": size.micro_batch, "maxSeqLength": size.length, "supervisedShare": round(share, 3)},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
        "sides": sides,
        "seconds": round(time.monotonic() - began),
    }


def _summary(side: Side, watched: Sequence[Watched], runs: dict[Side, list[Watched]], share: float) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the first side with as many processes: the median of those of rounds."""
    plain = next(watched for first, watched in runs.items() if first.processes == side.processes)

    def middle(measure: Callable[[Watched], float]) -> float:
        return statistics.median(map(measure, watched))

    def ratio(measure: Callable[[Watched], float]) -> list[float]:
        ratios = [measure(ours) / measure(theirs) for ours, theirs in zip(watched, plain, strict=True)]
        return [round(value, 3) for value in (min(ratios), statistics.median(ratios), max(ratios))]

    speed = middle(lambda run: run.tokens_per_second)
    return {
        "side": side.name,
        "processes": side.processes,
        "rounds": len(watched),
        "tokensPerSecond": round(speed, 1),
        "supervisedTokensPerSecond": round(speed * share, 1),
        "tokensPerCpuSecond": round(middle(lambda run: run.tokens_per_cpu_second), 1),
        "peakMiB": round(middle(lambda run: run.peak_mib)),
        "firstStepSeconds": round(middle(lambda run: run.first_step_seconds), 1),
        "lastLoss": round(watched[-1].steps[-1].loss, 4),
        "learned": round(watched[-1].steps[0].loss - watched[-1].steps[-1].loss, 4),
        "ratioMinMedianMax": {
            "tokensPerSecond": ratio(lambda run: run.tokens_per_second),
            "tokensPerCpuSecond": ratio(lambda run: run.tokens_per_cpu_second),
            "peakMiB": ratio(lambda run: run.peak_mib),
            "firstStepSeconds": ratio(lambda run: run.first_step_seconds),
        },
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    job, first = result["job"], result["sides"][0]["side"]
    lines = [
        f"# Trainer against {first}",
        "",
        f"Written by `make bench-trainer`. Ratios are to {first} with as many processes, in the same round; the",
        "absolute numbers are those of one machine on one day.",
        "",
        f"{job['model']} in NF4, rank {RANK} on all linear layers, {job['steps']} steps of {job['globalBatchSize']} "
        f"sequences in micro-batches of {job['microBatchSize']}, at most {job['maxSeqLength']} tokens, "
        f"{job['supervisedShare']:.0%} of the tokens learned from, one thread a process, float32.",
        "",
        "| | processes | tokens/s | of them supervised | ratio | ratio by processor time | peak MiB | ratio "
        "| first step, s | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side in result["sides"]:
        ratios = {name: f"{values[1]:.2f}" for name, values in side["ratioMinMedianMax"].items()}
        lines.append(
            f"| {side['side']} | {side['processes']} | {side['tokensPerSecond']} | {side['supervisedTokensPerSecond']} "
            f"| {ratios['tokensPerSecond']} | {ratios['tokensPerCpuSecond']} | {side['peakMiB']} | {ratios['peakMiB']} "
            f"| {side['firstStepSeconds']} | {ratios['firstStepSeconds']} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    lines += ["", f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, {versions}."]
    return "\n".join(lines) + "\n"


def missed_aims(result: dict[str, Any]) -> list[str]:
    """A line for each of ``AIMS`` that ``result`` does not reach."""
    ratios = {side["side"]: side["ratioMinMedianMax"] for side in result["sides"]}
    missed = []
    for side, measure, sign, bound in AIMS:
        ratio = ratios[side.name][measure][1]
        if (ratio < bound) if sign == ">=" else (ratio > bound):
            missed.append(f"{side.name}: {measure} is {ratio:.2f} times that of plain TRL, and is to be {sign} {bound}")
    return missed


def other_jobs(result: dict[str, Any]) -> list[str]:
    """A line for each side whose loss falls otherwise than that of the first one: its speed says nothing.

    With packing a step holds more records, so its loss falls faster.
    """
    first, *others = (side for side in result["sides"] if side["side"] != PACKED.name)
    return [
        f"the loss falls by {side['learned']} in {side['side']} and by {first['learned']} in {first['side']}: "
        "that is not the same job"
        for side in others
        if abs(side["learned"] - first["learned"]) > LEARNED_TOLERANCE * abs(first["learned"])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -m bench.trainer``. 1 where an aim is missed (--quick has none) or jobs differ."""
    parser = argparse.ArgumentParser(description="Compare this trainer with plain TRL and PEFT on the CPU.")
    parser.add_argument("--quick", action="store_true", help="a small random model and one round, in about a minute")
    parser.add_argument("--rounds", type=int, help="turns of each program (default: 2, with --quick 1)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 3)")
    parser.add_argument(
        "--levers",
        nargs="+",
        default=[],
        metavar="LEVER",
        help="compare this trainer with itself instead, each lever of LORA_SPEED switched; only print the table",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory to write trainer.md and trainer.json to")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    size = replace(size, rounds=options.rounds or size.rounds, steps=options.steps or size.steps)
    with tempfile.TemporaryDirectory() as directory:
        result = compare(size, Path(directory), order=turns(size, options.levers))
    table = to_markdown(result)
    if options.levers:
        print(table)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trainer.md").write_text(table, encoding="utf-8")
    (options.out / "trainer.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table)
    missed = other_jobs(result) + ([] if options.quick else missed_aims(result))
    print(*missed, sep="\n", end="\n" if missed else "", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

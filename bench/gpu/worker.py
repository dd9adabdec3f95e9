"""One training process of a part: the trainer's own worker, on random weights, with a probe that measures.

``python -m bench.gpu.worker RUN.json PROBE.json``: PROBE.json says what else differs from a run in a pod.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import lora_trainer.train as page
from bench.gpu.models import random_base_model
from lora_trainer.loading import Part, keeping
from lora_trainer.settings import Place
from lora_trainer.worker import end_process, run_worker

LOGIT_TOKENS = 32


@dataclass(frozen=True)
class Probe:
    """What a part asks for.

    Attributes:
        result: file for what was measured, written by rank 0 at the end of training.
        logits: file for the logits of a fixed batch before training, or ``None``.
        one_gpu: all ranks share GPU 0 and talk through gloo; NCCL refuses that.
        attention: implementation of attention, or ``None`` for the trainer's choice.
        leave_bytes: GPU memory to leave to the run; the rest is taken before it starts.
    """

    result: Path
    logits: Path | None = None
    one_gpu: bool = False
    attention: str | None = None
    leave_bytes: int | None = None

    @staticmethod
    def read(path: Path) -> "Probe":
        """From JSON."""
        value = json.loads(path.read_text())
        return Probe(
            **{**value, "result": Path(value["result"]), "logits": value.get("logits") and Path(value["logits"])}
        )


class Measure(TrainerCallback):
    """Logits before training, and peak memory after it."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes the logits. All ranks run the forward pass."""
        if self.probe.logits is None:
            return
        ids = torch.arange(2, 2 + LOGIT_TOKENS, device=args.device)[None]
        training = model.training
        model.eval()
        with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        model.train(training)
        if state.is_world_process_zero:
            torch.save(logits.float().cpu(), self.probe.logits)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes what was measured."""
        if not state.is_world_process_zero:
            return
        peak = {}
        if args.device.type == "cuda":
            peak = {
                "allocatedGiB": torch.cuda.max_memory_allocated() / 2**30,
                "reservedGiB": torch.cuda.max_memory_reserved() / 2**30,
            }
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        attention = model.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
        self.probe.result.write_text(json.dumps({"losses": losses, "attention": attention, **peak}))


def install(probe: Probe) -> None:
    """Puts random weights and the probe into the trainer's page; all else stays as in a pod."""
    build = page.build_trainer

    def build_trainer(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.add_callback(Measure(probe))
        return trainer

    def load_base_model(directory: Path, quantization: Any, device: torch.device, part: Part | None = None) -> Any:
        if probe.leave_bytes is not None:
            take_memory(device, probe.leave_bytes)
        with keeping(part):
            return random_base_model(directory, quantization, device, probe.attention)

    page.build_trainer = build_trainer
    page.load_base_model = load_base_model
    if probe.one_gpu:
        page.training_device = lambda run, local_rank: first_gpu(run)
        page.start_process_group = meet_over_gloo


def meet_over_gloo(place: Place, device: torch.device, timeout: float, store: Any, **_: Any) -> None:
    """The process group of ranks that share one GPU."""
    if place.world_size > 1:
        dist.init_process_group("gloo", store=store(), rank=place.rank, world_size=place.world_size)


def first_gpu(run: Any) -> torch.device:
    """GPU 0 for every rank, or the CPU."""
    if run.parallelism.gpus_per_node == 0:
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def take_memory(device: torch.device, leave: int) -> None:
    """Takes all free memory of the GPU but ``leave`` bytes, and never gives it back."""
    free, _ = torch.cuda.mem_get_info(device)
    kept.append(torch.empty(max(0, free - leave), dtype=torch.uint8, device=device))


kept: list[torch.Tensor] = []


def main() -> None:
    """Runs the worker to its end, with its exit code."""
    run_file, probe_file = map(Path, sys.argv[1:3])
    install(Probe.read(probe_file))
    end_process(run_worker(run_file))


if __name__ == "__main__":
    main()

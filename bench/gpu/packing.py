"""Packed rows with a mask and without: the same losses and gradients from PyTorch's kernel, and how much faster."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.gpu.models import random_base_model, write_model
from bench.gpu.parts import PARITY_TOLERANCE, ROOT, RUN_SECONDS, Machine
from lora_api.training import Quantization
from lora_trainer.packs import Layout
from lora_trainer.sft import make_micro_batch
from lora_trainer.tokens import Document, make_document
from lora_trainer.varlen import read_needs, use_varlen, why_dense

ROUNDS = 3
DOCUMENTS = 10
"""Documents in a row: their lengths are 1, 2, ... parts of it."""


def packing(machine: Machine, report: Callable[[str, dict[str, Any]], None]) -> None:
    """Forward and backward pass over one packed row: attention of a mask against ``varlen_attn``, by its length.

    In a process of its own, whose GPU memory goes with it.
    """
    if not machine.on_gpu:
        report("packing", {"failed": "needs CUDA: the kernel runs nowhere else"})
        return
    command = [sys.executable, "-m", "bench.gpu.packing", str(machine.directory / "packing"), str(int(machine.tiny))]
    limit = machine.limit(RUN_SECONDS["packing"])
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        report("packing", {"failed": f"not ended after {limit:.0f} s"})
        return
    for line in done.stdout.splitlines():
        found = json.loads(line)
        report(found.pop("row"), found)
    if done.returncode:
        report("packing", {"failed": done.stderr[-600:]})


def main(directory: Path, *, tiny: bool) -> None:
    """Writes a JSON document a line: what each length of row gave."""
    device = torch.device("cuda", 0)
    write_model(directory, "tiny" if tiny else "llama-3-8b, 8 layers")
    model = random_base_model(directory, Quantization(type="none"), device, attention="sdpa")
    reason = why_dense(read_needs(model), torch.cuda.get_device_capability(device), half=True)
    if reason is not None:
        print(json.dumps({"row": "packing", "failed": f"this GPU makes the mask, because {reason}"}))
        return
    for length in (256,) if tiny else (2048, 4096, 8192):
        found = compare_packing(model, make_row(length), device)
        print(json.dumps({"row": f"rows of {length} tokens", **found}), flush=True)


def make_row(length: int) -> list[Document]:
    """Documents that fill a row of ``length`` tokens; all of each is learned."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.arange(1, DOCUMENTS + 1)
    lengths = (parts * length // int(parts.sum())).tolist()
    lengths[-1] += length - sum(lengths)
    tokens = [torch.randint(3, 300, (size,), generator=generator).tolist() for size in lengths]
    return [make_document(ids, [(0, len(ids))]) for ids in tokens]


def compare_packing(model: PreTrainedModel, row: list[Document], device: torch.device) -> dict[str, Any]:
    """Differences of losses and gradients between both ways, and the seconds of each. Leaves ``model`` with SDPA."""
    model.set_attn_implementation("sdpa")
    losses, gradient, dense = run_row(model, row, "packed", device)
    use_varlen(model)
    others, other, kernel = run_row(model, row, "flat", device)
    model.set_attn_implementation("sdpa")
    found: dict[str, Any] = {
        "lossDifference": float((others.mean() - losses.mean()).abs()),
        "gradientDifference": float((other - gradient).norm() / gradient.norm()),
        "secondsWithMask": round(dense, 4),
        "secondsWithKernel": round(kernel, 4),
    }
    if max(found["lossDifference"], found["gradientDifference"]) > PARITY_TOLERANCE:
        found["failed"] = f"differs by more than {PARITY_TOLERANCE}: is varlen_attn right here?"
    return found


def run_row(
    model: PreTrainedModel, row: list[Document], layout: Layout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Losses of the tokens, the gradient of their mean by the embeddings, and the median seconds of a pass."""
    batch = make_micro_batch([row], layout, 0)
    batch.pop("tokens", None)
    placed = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in batch.items()}
    embeddings = model.get_input_embeddings()(placed.pop("input_ids")).detach().requires_grad_()
    seconds = []
    for _ in range(ROUNDS + 1):
        embeddings.grad = None
        start = _now(device)
        losses = model(inputs_embeds=embeddings, **placed, use_cache=False, score_tokens=True).losses
        losses.mean().backward()
        seconds.append(_now(device) - start)
    assert embeddings.grad is not None  # for the type checker
    return losses.detach(), embeddings.grad.float(), statistics.median(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main(Path(sys.argv[1]), tiny=sys.argv[2] == "1")

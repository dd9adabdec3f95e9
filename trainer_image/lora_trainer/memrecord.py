"""Planned against measured memory of a run, for its progress and its report."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_trainer.memory import GIB, MemoryPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MemoryUse:
    """The peak of the process that needed most, in GiB.

    ``allocated`` and ``reserved`` are torch's on GPUs, ``None`` on CPUs. ``host`` is the largest resident size that a
    process has had since its start, which counts everything: Python, libraries, and files that are mapped.
    """

    allocated: float | None = None
    reserved: float | None = None
    host: float | None = None


@dataclass(frozen=True)
class MemoryRecord:
    """What was planned for one process before the model was loaded, and what was measured after training.

    Sizes are in GiB. ``plan`` is ``None`` where the architecture is not known. ``available`` is the memory that the
    micro-batch was chosen for, in the process that has the least.
    """

    micro_batch: int
    gradient_accumulation: int
    on_gpu: bool
    plan: MemoryPlan | None = None
    available: float | None = None
    measured: MemoryUse = field(default_factory=MemoryUse)

    @property
    def planned(self) -> float | None:
        """The plan's figure that is comparable to what is measured: allocated on GPUs, else all of the plan."""
        if self.plan is None:
            return None
        return self.plan.allocated if self.on_gpu else self.plan.total

    def to_progress(self) -> dict[str, Any]:
        """Fields of a progress line."""
        sizes = {
            "planned_gib": self.planned,
            "available_gib": self.available,
            "allocated_gib": self.measured.allocated,
            "reserved_gib": self.measured.reserved,
            "host_gib": self.measured.host,
        }
        rounded = {name: None if size is None else round(size, 3) for name, size in sizes.items()}
        return {
            "micro_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.gradient_accumulation,
            **rounded,
        }

    def to_rows(self) -> list[tuple[str, str]]:
        """The table of the report: figure and GiB."""
        kind = "GPU" if self.on_gpu else "host"
        rows: list[tuple[str, float | None]] = [(f"planned, {kind} memory of one process", self.planned)]
        if self.plan is not None:
            rows += [(f"planned: {name}", size) for name, size in self.plan.parts().items() if size > 0]
        rows += [
            ("available when the micro-batch was chosen", self.available),
            ("measured: allocated by torch", self.measured.allocated),
            ("measured: reserved by torch", self.measured.reserved),
            ("measured: resident memory of the process", self.measured.host),
        ]
        shown = [("micro-batch, sequences", str(self.micro_batch))]
        return shown + [(f"{name}, GiB", f"{size:.3f}") for name, size in rows if size is not None]


def measure_memory(device: "torch.device") -> MemoryUse:
    """The peaks since this process began, over all processes. All of them call it."""
    import resource

    import torch
    import torch.distributed as dist

    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB]
    if device.type == "cuda":
        peaks += [torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB]
    if dist.is_initialized():
        tensor = torch.tensor(peaks, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        peaks = tensor.tolist()
    host, allocated, reserved = [*peaks, None, None][:3]
    return MemoryUse(allocated, reserved, host)

"""``python -m lora_trainer estimate``: whether a manifest's run fits on a GPU, part by part. Loads no model."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lora_api.finetune import KIND, LoRAFineTune
from lora_api.mistakes import describe_mistakes
from lora_api.run import plan_batch
from lora_trainer.errors import BadSpecError
from lora_trainer.fitting import Suggestion, build_job, settle, suggest
from lora_trainer.job import Job
from lora_trainer.memory import MemoryPlan, plan_memory
from lora_trainer.modelshape import read_shape
from lora_trainer.servedplan import ServedPlan, plan_served

DOES_NOT_FIT = 1
"""Exit code of ``estimate`` where the run does not fit. No class of the failure table has it: nothing failed."""

PART_TEXT = {
    "weightsSharded": "weights, this GPU's share",
    "weightsReplicated": "quantization constants, whole on each GPU",
    "gatheredLayers": "embedding, head and 2 layers, gathered",
    "loraAndOptimizer": "adapter, gradient and optimizer, share",
    "activations": "activations",
    "logits": "loss, beyond one layer's activations",
    "dequantization": "one layer's weight, dequantized",
    "context": "CUDA context and NCCL",
    "loading": "loading, beyond training",
}
"""What each part is, for people."""

MAX_ERRORS = 20


class _ManifestLoader(yaml.SafeLoader):
    """YAML as kubectl reads it: 2e-4 is a number, and a date is text."""


_ManifestLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_ManifestLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Estimate:
    """The plan of one run for one kind of GPU."""

    job: Job
    plan: MemoryPlan
    device_gib: float
    suggestions: list[Suggestion]
    served: ServedPlan

    @property
    def fits(self) -> bool:
        """Whether the run fits with margin."""
        return self.plan.fits(self.device_gib)

    def to_wire(self) -> dict[str, Any]:
        """The JSON form. Sizes in GiB."""
        return {
            "perGpu": {
                "totalGiB": _rounded(self.plan.total),
                "safeGiB": _rounded(self.plan.safe),
                "parts": {name: _rounded(size) for name, size in self.plan.parts().items()},
            },
            "microBatchSize": self.job.micro_batch,
            "shardSize": self.job.shards,
            "deviceGiB": self.device_gib,
            "fits": self.fits,
            "served": {
                "dtype": self.served.dtype,
                "sameBase": self.served.same_base,
                "offload": self.served.offload,
                "problem": self.served.problem,
                "totalGiB": None if self.served.memory is None else _rounded(self.served.memory.total),
                "safeGiB": None if self.served.memory is None else _rounded(self.served.memory.safe),
            },
            "suggestions": [
                {
                    "changes": suggestion.changes,
                    "totalGiB": _rounded(suggestion.plan.total),
                    "safeGiB": _rounded(suggestion.plan.safe),
                }
                for suggestion in self.suggestions
            ],
        }

    def to_text(self) -> str:
        """The table for people."""
        job, plan = self.job, self.plan
        width = max(map(len, PART_TEXT.values()))
        rows = [(PART_TEXT[name], size) for name, size in plan.parts().items()]
        rows += [("total", plan.total), ("needed to be safe (total x 1.10 + 1.5)", plan.safe)]
        lines = [
            f"{job.shape.architecture}, {job.shape.total_weights / 1e9:.2f}e9 weights, {job.quantization.type}, "
            f"{job.micro_batch} x {job.sequence} tokens, {describe_gpus(job)}",
            "",
            "GiB per GPU",
            *(f"{text:<{width}}  {size:8.2f}" for text, size in rows),
            "",
            f"{'fits' if self.fits else 'does not fit'} in {self.device_gib:g} GiB",
        ]
        lines += ["", self.served.to_text()]
        if self.suggestions:
            lines += ["", "room for:" if self.fits else "it fits with one of these, the cheapest first:"]
            lines += [f"  {one.to_text()}  (safe: {one.plan.safe:.2f} GiB)" for one in self.suggestions]
        elif not self.fits:
            lines += ["", "no smaller micro-batch, number of GPUs or sequence length makes it fit"]
        return "\n".join(lines)


def describe_gpus(job: Job) -> str:
    """How many processes there are, and how many share a copy of the weights."""
    unit = "process" if job.stack.host else "GPU"
    if job.world_size == 1:
        return f"1 {unit}"
    parts = f"weights over {job.shards}" if job.shards > 1 else "weights whole on each"
    return f"{job.world_size} {unit}{'es' if job.stack.host else 's'}, {parts}"


def estimate(manifest: Path, model_config: Path, device_gib: float) -> Estimate:
    """The estimate for the run in ``manifest`` on GPUs with ``device_gib`` GiB.

    Raises:
        BadSpecError: something cannot be read or is wrong; the message names the field.
    """
    if not math.isfinite(device_gib) or device_gib <= 0:
        raise BadSpecError(f"--gpu-memory-gib is {device_gib:g}; give the memory of one GPU in GiB, such as 80")
    spec = read_manifest(manifest).spec
    if spec.parallelism.gpus_per_node == 0:
        raise BadSpecError("spec.parallelism.gpusPerNode: 0 trains on CPUs; this plans GPUs: set 1 or more")
    job = build_job(spec, read_shape(_read_json(model_config)), device_gib=device_gib)
    job = settle(spec.training, job, device_gib)[0] or job
    suggestions = suggest(job, spec.training.global_batch_size, device_gib)
    return Estimate(job, plan_memory(job), device_gib, suggestions, plan_served(spec, job, device_gib))


def read_manifest(path: Path) -> LoRAFineTune:
    """The one LoRAFineTune in the YAML file ``path``; other resources in it are passed over.

    Raises:
        BadSpecError: it is not there or not valid; the message names every wrong field.
    """
    try:
        documents = list(yaml.load_all(_read_text(path), Loader=_ManifestLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadSpecError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    found = [one for one in documents if isinstance(one, dict) and one.get("kind") == KIND]
    if len(found) != 1:
        raise BadSpecError(f"{path}: kind: there must be exactly one {KIND} in the file, there are {len(found)}")
    manifest = dict(found[0])
    if isinstance(manifest.get("metadata"), dict):
        manifest["metadata"] = {"namespace": "default", **manifest["metadata"]}
    manifest.pop("status", None)
    try:
        run = LoRAFineTune.model_validate(manifest)
        plan_batch(run.spec.training, run.spec.parallelism)
    except ValidationError as error:
        raise BadSpecError(f"{path}: {describe_mistakes(error, LoRAFineTune, most=MAX_ERRORS)}") from error
    except ValueError as error:
        raise BadSpecError(f"{path}: spec.{error}") from error
    return run


def _read_json(path: Path) -> object:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadSpecError(f"{path}: not JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadSpecError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadSpecError(f"{path}: not UTF-8 text") from error


def _rounded(size: float) -> float:
    return round(size, 3)

"""What makes a step fast beside the model itself, each of it a lever that the benchmarks can switch.

``LORA_SPEED`` holds the names of levers, separated by commas: ``liger`` switches one on, ``no-summed-loss`` one off.
What needs a GPU to be measured and changes more than the order of sums is off by default.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from lora_api.run import RunSpec
from lora_trainer.architecture import decoder_layers
from lora_trainer.compilers import check_triton
from lora_trainer.errors import BadSpecError
from lora_trainer.loss import IGNORED
from lora_trainer.parallel import sum_over_ranks

SPEED_VARIABLE = "LORA_SPEED"


@dataclass(frozen=True)
class Levers:
    """Which levers are on.

    Attributes:
        summed_loss: nothing is computed for metrics that nobody reads (``loss``). Off: TRL's loss, its entropy and
            accuracy included, on GPUs by kernels of Triton. Evaluation and preferences never take it.
        fused_optimizer: one kernel for all of AdamW (GPUs).
        prefetch: the next step's micro-batches are made, and copied to the GPU, by a thread while this one computes
            (``ahead``). ``None``: on GPUs. On CPUs it costs more than it hides (docs/speed.md).
        pinned_memory: batches are copied to the GPU from page-locked memory, beside the computation (GPUs).
        liger: Liger's kernels for norms, rotary embedding and gated MLPs (GPUs, families that it knows): Triton's.
        compile: decoder layers are compiled in training (``torch.compile``). Needs a compiler in the image.
    """

    summed_loss: bool = True
    fused_optimizer: bool = True
    prefetch: bool | None = None
    pinned_memory: bool = True
    liger: bool = False
    compile: bool = False


def read_levers(env: Mapping[str, str] = os.environ) -> Levers:
    """The defaults, changed as ``LORA_SPEED`` says.

    Raises:
        BadSpecError: it names no lever.
    """
    known = {field.name.replace("_", "-"): field.name for field in fields(Levers)}
    changes = {}
    for word in filter(None, (part.strip() for part in env.get(SPEED_VARIABLE, "").split(","))):
        name = word.removeprefix("no-")
        if name not in known:
            raise BadSpecError(
                f"{SPEED_VARIABLE}: there is no lever {name}; there are {', '.join(known)}, and each with no- in front"
            )
        changes[known[name]] = name == word
    return replace(Levers(), **changes)


def check_levers(run: RunSpec, levers: Levers) -> None:
    """What the levers need is there. Asked before anything is fetched.

    Raises:
        BadSpecError: on GPUs a lever needs Triton, and Triton what the image does not have.
    """
    if run.parallelism.gpus_per_node == 0:
        return
    supervised = run.training.objective == "sft"
    needs = {
        "compile": levers.compile,
        "liger": levers.liger and supervised,
        "no-summed-loss": not levers.summed_loss and supervised,
    }
    for name in (name for name, needed in needs.items() if needed):
        check_triton(f"{SPEED_VARIABLE}: {name}")


class FastSteps(Trainer):
    """Mix-in before SFTTrainer: the summed loss, and tokens counted without asking the device in every micro-batch.

    TRL gathers three metrics and a count over all ranks after each micro-batch and waits for the values. Here the count
    stays on the device until it is logged.
    """

    summed_loss = True
    aux_loss_enabled = False
    """Whether the routers' loss is a part of what is trained, and its weight: TRL sets both by the model's config."""
    router_aux_loss_coef = 0.0
    _tokens: torch.Tensor | int = 0
    _tokens_logged = 0.0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss: its sum over supervised tokens / those of the whole step.

        ``num_items_in_batch`` counts the supervised tokens of all micro-batches on all ranks. Gradients are averaged
        over ranks afterwards, so the share is multiplied by their number. A routers' loss is a mean over the tokens of
        the micro-batch, of which the step's is the mean, as in TRL. All of it is float32, whatever the type of the
        model. ``inputs`` may say how many ``tokens`` it has, where its mask does not.
        """
        tokens = inputs.pop("tokens", None)
        if not self.summed_loss or return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores = model(**inputs, use_cache=False, score_tokens=True, router_loss=self.aux_loss_enabled)
        loss: torch.Tensor = scores.losses.sum()
        if tokens is None:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        self._tokens += tokens
        if num_items_in_batch is None:
            loss, steps = loss / (inputs["labels"][..., 1:] != IGNORED).sum().clamp(min=1), 1
        else:
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * ranks / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            steps = self.current_gradient_accumulation_steps
        if scores.router_loss is not None:
            loss = loss + self.router_aux_loss_coef * scores.router_loss / steps
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ``num_tokens``, the tokens of all ranks since training began. All ranks call it."""
        if self.summed_loss and "loss" in logs:
            self._tokens_logged += sum_over_ranks([float(self._tokens)], self.args.device)[0]
            self._tokens = 0
            logs["num_tokens"] = self._tokens_logged
        super().log(logs, start_time)


def apply_levers(model: torch.nn.Module, levers: Levers, device: torch.device) -> None:
    """Changes the layers of ``model``, before it is sharded.

    Raises:
        BadSpecError: a lever that is on cannot work here.
    """
    if levers.liger:
        apply_liger(base_model(model), device)
    if levers.compile:
        compile_layers(model, device)


def apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Liger's kernels, all but those of the loss.

    Raises:
        BadSpecError: there is no GPU, or the family is unknown to Liger.
    """
    if device.type != "cuda":
        raise BadSpecError(f"{SPEED_VARIABLE}: liger needs GPUs")
    from liger_kernel.transformers import monkey_patch

    kind = str(model.config.model_type)
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise BadSpecError(f"{SPEED_VARIABLE}: Liger has no kernels for the family {kind}")
    monkey_patch._apply_liger_kernel_to_instance(  # noqa: SLF001 - what transformers' Trainer calls
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )


def compile_layers(model: torch.nn.Module, device: torch.device) -> None:
    """Compiles the decoder layers one by one: equal layers share their code, so it takes as long as one or two.

    The forward method is compiled, not the module: its name and parameters stay as they are, and what FSDP2 does before
    and after a layer stays outside, as where torchtitan compiles its blocks. Gradient checkpointing is inside.
    Evaluation is not compiled: each length of an answer that is generated would be compiled anew.

    Raises:
        BadSpecError: there is no compiler.
    """
    check_compiler(device)
    for layer in decoder_layers(model):
        layer.forward = _compiled_in_training(layer)


def _compiled_in_training(layer: torch.nn.Module) -> Any:
    plain = layer.forward
    compiled = torch.compile(plain)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else plain)(*args, **kwargs)

    return forward


def check_compiler(device: torch.device) -> None:
    """Raises BadSpecError unless torch.compile finds what it needs: a C++ compiler, and on GPUs Triton's."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type == "cuda":
        check_triton(f"{SPEED_VARIABLE}: compile")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BadSpecError(
            f"{SPEED_VARIABLE}: compile needs a C++ compiler, and there is none in the image: install g++, or name it "
            "in CXX"
        ) from error


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The language model inside an adapter."""
    found: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    return found

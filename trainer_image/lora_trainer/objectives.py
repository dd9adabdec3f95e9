"""What ``training.objective`` chooses between."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainerCallback

from lora_api.run import RunSpec
from lora_trainer.model import compute_dtype
from lora_trainer.precision import autocast_forward
from lora_trainer.preference import build_preference_trainer
from lora_trainer.prepare import TrainingData
from lora_trainer.sft import build_supervised_trainer
from lora_trainer.speed import base_model
from lora_trainer.trainer import LoRATrainer


def build_trainer(
    run: RunSpec,
    model: PeftModel,
    tokenizer: Tokenizer,
    data: TrainingData,
    device: torch.device,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
) -> LoRATrainer:
    """The trainer of ``run``: its model is not sharded yet.

    Raises:
        BadSpecError: the batch sizes do not fit.
    """
    build = build_preference_trainer if run.training.objective == "dpo" else build_supervised_trainer
    trainer = build(run, model, tokenizer, data, device, directory, callbacks)
    autocast_forward(base_model(model), compute_dtype(run.quantization, device), device)
    return trainer

"""Supervised fine-tuning: TRL's SFTTrainer on the shared trainer, with tokens and batches of our own."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_api.run import RunSpec
from lora_trainer.loss import router_loss_weight
from lora_trainer.model import compute_dtype
from lora_trainer.packs import Layout, check_isolation, choose_layout, collate, flash_arguments
from lora_trainer.prepare import TrainingData
from lora_trainer.speed import FastSteps, apply_levers, base_model, read_levers
from lora_trainer.tokens import Document
from lora_trainer.trainer import LoRATrainer, loop_arguments, restore_adapter_precision
from lora_trainer.varlen import settle_packing

if TYPE_CHECKING:
    from lora_trainer.checkpointfiles import Resume


class SupervisedTrainer(FastSteps, LoRATrainer, SFTTrainer):
    """SFTTrainer for a gang of processes."""

    layout: Layout = "padded"

    def train_to_end(self, resume: "Resume | None") -> None:
        """Trains, on a model that is seen to keep documents apart: the whole of it is there only once it is spread.

        Raises:
            BadSpecError: it does not.
        """
        check_isolation(self.model, self.layout, self.model.config.get_text_config().vocab_size, self.args.device)
        super().train_to_end(resume)


def build_supervised_trainer(
    run: RunSpec,
    model: PeftModel,
    tokenizer: Tokenizer,
    data: TrainingData,
    device: torch.device,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
) -> SupervisedTrainer:
    """The trainer of ``run``: its model is not sharded yet.

    Raises:
        BadSpecError: the batch sizes do not fit.
    """
    arguments = loop_arguments(run, len(data.train), device, directory)
    if data.train.packed:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        half = compute_dtype(run.quantization, device) != torch.float32
        settle_packing(base_model(model), capability, half=half, say=device.index in (None, 0))
    layout = choose_layout(str(model.config._attn_implementation), packed=data.train.packed)  # noqa: SLF001
    trainer = SupervisedTrainer(
        model=model,
        args=SFTConfig(
            **arguments,
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            router_aux_loss_coef=router_loss_weight(base_model(model)),
        ),
        data_collator=partial(make_micro_batch, layout=layout, pad_token=int(tokenizer.pad_token_id)),
        # TRL looks at the first record and wants a table; what is trained on takes its place.
        train_dataset=Dataset.from_list([{"input_ids": [0], "labels": [0]}]),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train_dataset, trainer.eval_dataset, trainer.layout = data.train, data.eval, layout
    restore_adapter_precision(model)
    trainer.summed_loss = read_levers().summed_loss
    apply_levers(model, read_levers(), device)
    return trainer


def make_micro_batch(sequences: Sequence[list[Document]], layout: Layout, pad_token: int) -> dict[str, Any]:
    """What the model is given for a micro-batch, and in rows with many documents the number of their ``tokens``."""
    batch: dict[str, Any] = dict(collate(sequences, layout, pad_token))
    if layout == "flat":
        return batch | flash_arguments(batch)
    if layout == "packed":
        batch["tokens"] = sum(len(document.ids) for sequence in sequences for document in sequence)
    return batch

"""Supervised fine-tuning: TRL's SFTTrainer on the shared trainer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_api.run import RunSpec
from lora_trainer.data import Records
from lora_trainer.errors import BadDataError
from lora_trainer.speed import FastSteps, apply_levers, read_levers
from lora_trainer.trainer import LoRATrainer, loop_arguments, restore_adapter_precision


class SupervisedTrainer(FastSteps, LoRATrainer, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for a gang of processes."""


def build_supervised_trainer(
    run: RunSpec,
    model: PeftModel,
    tokenizer: Tokenizer,
    records: Records,
    device: torch.device,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
) -> SupervisedTrainer:
    """The trainer of ``run``: its datasets are tokenized, its model is not sharded yet.

    Raises:
        BadSpecError: the batch sizes do not fit.
        BadDataError: nothing of the records is left to learn from within maxSeqLength.
    """
    arguments = loop_arguments(run, len(records.train), device, directory)
    trainer = SupervisedTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=run.dataset.max_seq_length, packing=False, dataset_num_proc=None),
        train_dataset=Dataset.from_list(records.train),
        eval_dataset=Dataset.from_list(records.eval) if records.eval else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    restore_adapter_precision(model)
    trainer.prepare_loss(summed=read_levers().summed_loss)
    apply_levers(model, read_levers(), device)
    for name, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None and len(dataset) == 0:
            raise BadDataError(
                f"dataset.{name}: every record is cut at dataset.maxSeqLength = {run.dataset.max_seq_length} tokens, "
                "before the part that is learned from; raise maxSeqLength"
            )
    return trainer

"""What every objective shares: sharding, exact epochs, checkpoints in the store, finite steps."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainerState

from lora_api.run import BatchPlan, RunSpec, plan_batch
from lora_trainer.ahead import Ahead, start_maker
from lora_trainer.devices import product_type, traits
from lora_trainer.errors import BadSpecError
from lora_trainer.evaluate import Evaluator, Prompt
from lora_trainer.finite import FiniteTrainer
from lora_trainer.optim import optimizer_name
from lora_trainer.progress import Progress
from lora_trainer.rows import row_parameters
from lora_trainer.sampler import EpochSampler, total_steps
from lora_trainer.settings import Place
from lora_trainer.speed import read_levers
from lora_trainer.untouched import check_same_model, kept_from_accelerate

if TYPE_CHECKING:
    from lora_trainer.checkpoint import Checkpoints
    from lora_trainer.checkpointfiles import Resume
    from lora_trainer.proof import Proof

TRAINER_STATE_NAME = "trainer_state.json"


class LoRATrainer(FiniteTrainer):
    """Trainer for a gang of processes. Objectives add their loss; it goes before TRL's trainers among their bases."""

    checkpoints: "Checkpoints | None" = None
    proof: "Proof | None" = None
    sampler: EpochSampler | None = None
    _maker: ThreadPoolExecutor | None = None
    _ahead: Ahead | None = None

    def prepare(self, resume: "Resume | None", token_budget: int, place: Place, progress: Progress) -> None:
        """Gets what the objective needs besides the model; supervised fine-tuning needs nothing. All ranks call it.

        The model is sharded. Its adapter is fresh, or that of the checkpoint.
        """

    def objective_state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """Tensors and metadata for a checkpoint that ``prepare`` could not compute again from a trained adapter."""
        return None

    def build_evaluator(
        self, tokenizer: Tokenizer, questions: list[tuple[Prompt, str | None]], token_budget: int, place: Place
    ) -> Evaluator:
        """An evaluator of this trainer's model on the held-out records."""
        return Evaluator(self.model, tokenizer, self.eval_dataset, questions, token_budget, place, self.args.device)

    def train_to_end(self, resume: "Resume | None") -> None:
        """Trains the steps that are left. A checkpoint of the last step leaves none."""
        if resume is not None and resume.step >= self.args.max_steps:
            self.state = TrainerState.load_from_json(str(resume.directory / TRAINER_STATE_NAME))
            self.skipped = resume.skipped
            return
        wanted = read_levers().prefetch
        if traits(self.args.device).prefetch if wanted is None else wanted:
            self._maker = start_maker(self.args.device)
        try:
            self.train(resume_from_checkpoint=str(resume.directory) if resume else None)
        finally:
            if self._maker is not None:
                self._maker.shutdown(wait=False, cancel_futures=True)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and how many tokens they learn from. Those of the next step are made meanwhile.

        All ranks call it: the count is summed up.
        """
        if self._maker is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._ahead is None or self._ahead.source is not epoch_iterator:
            self._ahead = Ahead(epoch_iterator, num_batches, self._maker)
        return super().get_batch_samples(self._ahead, num_batches, device)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All but the rows of new tokens, which so have a group of their own: torch does not mix shards with wholes."""
        rows = row_parameters(model)
        own = {name for name, parameter in model.named_parameters() if parameter in rows}
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def create_accelerator_and_postprocess(self) -> None:
        """A process has one GPU. Alone, transformers would take all that it sees, and multiply the micro-batch."""
        super().create_accelerator_and_postprocess()
        self.args._n_gpu = min(self.args.n_gpu, 1)  # noqa: SLF001 - n_gpu has no setter

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, Any]:
        """Makes the optimizer and the schedule. The model stays as it is: ``sharding`` has spread it.

        Raises:
            InternalError: it did not.
        """
        with kept_from_accelerate(self.model):
            model, loader = super()._prepare_for_training(*args, **kwargs)
        check_same_model(model, self.model)
        return model, loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        plan = self.args.gradient_accumulation_steps * self.args.per_device_train_batch_size * self.args.world_size
        self.sampler = EpochSampler(len(dataset), plan, self.args.seed, getattr(dataset, "lengths", None))
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Tells the sampler which epoch begins.

        transformers does that too, but in an epoch that is resumed in the middle the sampler lies one layer deeper with
        several processes, behind accelerate's skipped batches, and is not reached (transformers 5.23): the rest of the
        epoch would have the order of the first one. accelerate's loader counts epochs when it is read to its end, which
        the thread does that is ahead: it must have.
        """
        if self._ahead is not None:
            self._ahead.wait()
        if self.sampler is not None:
            self.sampler.set_epoch(self.state.global_step // self.sampler.steps)
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Saves to the store, in place of accelerate's own files, what was learned on the weights that were loaded."""
        if self.proof is not None:
            self.proof.check_shards()
        if self.checkpoints is not None:
            self.checkpoints.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The adapter's weights are loaded once the model is sharded, before the loop starts."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.checkpoints is not None and checkpoint is not None:
            self.checkpoints.load_optimizer(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.checkpoints is not None and checkpoint is not None:
            self.checkpoints.load_rng(Path(checkpoint))


def batch_plan(run: RunSpec) -> BatchPlan:
    """How a global batch is split up.

    Raises:
        BadSpecError: the batch sizes do not fit.
    """
    try:
        return plan_batch(run.training, run.parallelism)
    except ValueError as error:
        raise BadSpecError(str(error)) from error


def loop_arguments(run: RunSpec, records: int, device: torch.device, directory: Path) -> dict[str, Any]:
    """Arguments of the training loop, for ``records`` of an epoch. Evaluation and its output are ours: off here.

    Raises:
        BadSpecError: the batch sizes do not fit, or LORA_SPEED names no lever.
    """
    training, plan, steps = run.training, batch_plan(run), total_steps(run, records)
    levers = read_levers()
    kind, products = traits(device), product_type(run.quantization.compute_dtype, device)
    schedulers = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    return {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": schedulers[training.scheduler],
        "warmup_steps": round(training.warmup_ratio * steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": optimizer_name(run, fused=kind.fused_optimizer and levers.fused_optimizer),
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "bf16": products == torch.bfloat16,
        "use_cpu": kind.accelerate_cpu,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": kind.pinned_memory and levers.pinned_memory,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_strategy": "steps",
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # callbacks.BoundaryCallback says when
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def restore_adapter_precision(model: PeftModel) -> None:
    """Puts the trainable weights back to float32: TRL casts them to bfloat16 where the base model is quantized.

    On GPUs the forward pass is bfloat16 all the same, by mixed precision; the optimizer's copy stays exact.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)

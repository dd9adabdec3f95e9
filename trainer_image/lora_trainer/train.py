"""One run, from the base model to the published adapter. Every process of the gang runs this page."""

from dataclasses import replace
from importlib.metadata import version

from transformers import PrinterCallback

from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer import __version__
from lora_trainer.callbacks import EvaluationCallback, ProgressCallback, StopCallback
from lora_trainer.checkpoint import Checkpoints
from lora_trainer.data import load_records
from lora_trainer.evaluate import Evaluator, sample_questions
from lora_trainer.gate import check_gate_has_records
from lora_trainer.memrecord import measure_memory
from lora_trainer.metrics import read_metrics
from lora_trainer.model import (
    add_adapter,
    check_chat_template,
    check_quantization,
    load_base_model,
    load_tokenizer,
    training_device,
)
from lora_trainer.objectives import build_trainer
from lora_trainer.parallel import shard_model, start_process_group
from lora_trainer.progress import Progress
from lora_trainer.publish import find_published
from lora_trainer.release import Release, publish_run
from lora_trainer.report import RunResult
from lora_trainer.settings import Place, state_directory
from lora_trainer.sizing import settle_micro_batch
from lora_trainer.sources import fetch_sources
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


def train(run: RunSpec, place: Place, stop: StopRequest, progress: Progress) -> AdapterStatus | None:
    """Trains, evaluates and publishes ``run``. Rank 0 returns the published adapter, the others ``None``.

    Raises:
        TrainerError: with its row of the failure table; exceptions of libraries are told apart by ``errors.classify``.
    """
    work = state_directory()
    store = Store(run.publish.store)
    if run.attempt > 1 and (published := find_published(store, run)):
        return published
    progress.stage("loading")
    sources = fetch_sources(run, place, work / "sources")
    tokenizer = load_tokenizer(sources.model)
    records = load_records(run.dataset, sources, chat=bool(tokenizer.chat_template))
    check_chat_template(tokenizer, records)
    check_gate_has_records(run, len(records.eval))
    check_quantization(run)
    device = training_device(run, place.local_rank)
    start_process_group(place, device)
    find_checkpoint = Checkpoints(store, run, place, work / "checkpoints", progress).find
    run, memory = settle_micro_batch(run, sources.model, place, device, find_checkpoint)
    progress.report_memory(**memory.to_progress())

    base = load_base_model(sources.model, run.quantization, device)
    model = add_adapter(base, run.lora, run.training.seed)
    in_between = EvaluationCallback(run.training.eval_every_steps, progress)
    callbacks = [ProgressCallback(progress), in_between, StopCallback(stop)]
    trainer = build_trainer(run, model, tokenizer, records, device, work / "trainer", callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints = checkpoints = Checkpoints(store, run, place, work / "checkpoints", progress)
    shard_model(trainer.accelerator, model)
    checkpoints.check_writable()
    resume = checkpoints.restore(model)

    budget = trainer.args.per_device_train_batch_size * run.dataset.max_seq_length
    questions = sample_questions(run.publish, records)
    evaluator = Evaluator(model, tokenizer, trainer.eval_dataset, questions, budget, place, device)
    in_between.evaluate = evaluator.loss
    progress.stage("evaluating")
    before = checkpoints.before = resume.before if resume else evaluator.run()
    progress.report_eval(step=0, total_steps=trainer.args.max_steps, eval_loss=before.loss)

    progress.stage("training")
    with stop.deferred():
        trainer.train_to_end(resume)
    stop.check()
    progress.stage("evaluating")
    after = evaluator.run()
    progress.report_eval(step=trainer.args.max_steps, total_steps=trainer.args.max_steps, eval_loss=after.loss)

    memory = replace(memory, measured=measure_memory(device))
    progress.report_memory(**memory.to_progress())
    progress.stage("publishing")
    versions = {"lora-trainer": __version__, **{name: version(name) for name in PACKAGES}}
    counts = (trainer.args.max_steps, len(records.train), len(records.eval))
    metrics = read_metrics(trainer.state.log_history, before, after, trainer.args.max_steps)
    result = RunResult(before, after, metrics, *counts, versions, memory=memory.to_rows())
    with stop.deferred():
        adapter = publish_run(Release(store, run, place, work / "adapter"), model, evaluator, result)
        if adapter is not None:
            checkpoints.delete_all()
    progress.stage("done")
    return adapter

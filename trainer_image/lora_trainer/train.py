"""One run, from the base model to the published adapter. Every process of the gang runs this page."""

from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch
from transformers import PrinterCallback

from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer import __version__
from lora_trainer.adapter import expected_shapes, gather_adapter
from lora_trainer.callbacks import BoundaryCallback, EvaluationCallback, ProgressCallback
from lora_trainer.checkpoint import Checkpoints
from lora_trainer.evaluate import sample_questions
from lora_trainer.gate import check_gate_has_records
from lora_trainer.line import Line
from lora_trainer.loading import part_to_load
from lora_trainer.memrecord import measure_memory
from lora_trainer.merge import check_mergeable
from lora_trainer.metrics import read_metrics
from lora_trainer.model import add_adapter, load_base_model, training_device
from lora_trainer.newtokens import read_tokenizer
from lora_trainer.objectives import build_trainer
from lora_trainer.origin import Identity, digest_data, find_beginning, identify_base
from lora_trainer.parallel import choose_strategy, start_process_group
from lora_trainer.pinned import check_pins
from lora_trainer.prepare import check_same_data, prepare_data
from lora_trainer.progress import Progress
from lora_trainer.proof import take_proof
from lora_trainer.publish import find_published
from lora_trainer.release import Release, publish_run
from lora_trainer.report import RunResult
from lora_trainer.rows import add_rows
from lora_trainer.rules import check_run
from lora_trainer.served import choose_part, describe_served, evaluate_served, free_memory, plan_served_run
from lora_trainer.settings import Place, state_directory
from lora_trainer.sharding import spread_model
from lora_trainer.sizing import settle_micro_batch
from lora_trainer.sources import fetch_sources
from lora_trainer.speed import check_levers, read_levers
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


def train(
    run: RunSpec, place: Place, stop: StopRequest, progress: Progress, line: Line | None = None
) -> AdapterStatus | None:
    """Trains, evaluates and publishes ``run``. Rank 0 returns the published adapter, the others ``None``.

    Raises:
        TrainerError: with its row of the failure table; exceptions of libraries are told apart by ``errors.classify``.
    """
    check_run(run)
    check_levers(run, read_levers())
    work = state_directory()
    store = Store(run.publish.store)
    if run.attempt > 1 and (published := find_published(store, run)):
        return published
    progress.stage("loading")
    sources = fetch_sources(run, place, work / "sources")
    check_pins(run, sources, place)
    tokenizer, tokens = read_tokenizer(run, sources.model)
    data = prepare_data(run, sources, tokenizer, place, work / "data")
    progress.note("\n".join([f"data: {data.report.to_text()}", *(f"warning: {one}" for one in data.report.warnings)]))
    check_gate_has_records(run, data.report.eval_records)
    device = training_device(run, place.local_rank)
    timeout = run.parallelism.collective_timeout_seconds
    start_process_group(place, device, timeout, line and line.group_store, alone_too=run.parallelism.cpu_offload)
    check_same_data(data, device)
    longest = None if run.dataset.packing else data.report.longest
    run, memory = settle_micro_batch(run, sources.model, place, device, partial(find_beginning, store, run), longest)
    progress.report_memory(**memory.to_progress())
    strategy = choose_strategy(run, sources.model, memory.available)
    longest = None if longest is None else max(longest, data.longest_evaluated)
    plan = plan_served_run(run, sources.model, longest, memory.available, device)
    if data.report.eval_records:
        progress.note(plan.to_text())

    part = part_to_load(strategy, place.rank)
    base = load_base_model(sources.model, run.quantization, device, part)
    proof = take_proof(base, strategy, place.rank)
    model = add_adapter(base, run.lora, run.training.seed)
    add_rows(model, tokens, part)
    check_mergeable(run, sources.model, expected_shapes(model))
    in_between = EvaluationCallback(run.training.eval_every_steps, progress, stop)
    identity = None
    if place.is_main:
        identity = Identity(identify_base(run, sources.model), digest_data(run, data.digest, len(data.train)))
    checkpoints = Checkpoints(store, run, place, work / "checkpoints", progress, stop, identity=identity)
    callbacks = [ProgressCallback(progress), in_between, BoundaryCallback(stop, checkpoints, line)]
    trainer = build_trainer(run, model, tokenizer, data, device, work / "trainer", callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints, trainer.proof = checkpoints, proof
    spread_model(model, strategy, device)
    proof.check_gathered(model)
    checkpoints.check_writable()
    resume = checkpoints.restore(model)
    origin = None if resume else checkpoints.find_origin(model, trainer.args.max_steps)
    checkpoints.tidy()

    budget = trainer.args.per_device_train_batch_size * run.dataset.max_seq_length
    questions = sample_questions(run.publish, data.shown, conversational=data.conversational)
    progress.stage("evaluating")
    trainer.prepare(resume, budget, place, progress)
    evaluator = trainer.build_evaluator(tokenizer, questions, budget, place)
    evaluator = replace(evaluator, part=choose_part(evaluator.records))
    in_between.evaluate = evaluator.measure
    before = checkpoints.before = resume.before if resume else evaluator.run()
    progress.report_eval(step=0, total_steps=trainer.args.max_steps, **before.scores)
    if origin is not None:
        checkpoints.adopt(origin, model)

    progress.stage("training")
    with stop.deferred():
        trainer.train_to_end(resume or origin)
    stop.check()
    progress.stage("evaluating")
    after = evaluator.run()
    progress.report_eval(step=trainer.args.max_steps, total_steps=trainer.args.max_steps, **after.scores)

    proof.check_gathered(model)
    memory = replace(memory, measured=measure_memory(device))
    progress.report_memory(**memory.to_progress())
    versions = {"lora-trainer": __version__, **{name: version(name) for name in PACKAGES}}
    counts = (trainer.args.max_steps, data.report.train_records, data.report.eval_records)
    metrics = read_metrics(trainer.state.log_history, before, after, trainer.args.max_steps)
    result = RunResult(
        before, after, metrics, *counts, versions, memory=memory.to_rows(), data=data.report,
        skipped_steps=trainer.skipped, resumed_from=checkpoints.resumed_from,
    )  # fmt: skip
    tensors, on_served = gather_adapter(model), None
    if plan.is_wanted and evaluator.records:
        evaluator = replace(evaluator, model=torch.nn.Identity())
        in_between.evaluate = lambda _: None
        del base, model, proof, trainer, callbacks
        free_memory(device)
        on_served = evaluate_served(evaluator, run, sources.model, tokens, tensors, plan, progress)
        model, evaluator = on_served.model, on_served.evaluator
    served = describe_served(plan, data.report.eval_records, before, after, on_served)
    progress.report_served(counts[0], served)

    progress.stage("publishing")
    release = Release(store, run, place, sources.model, work / "adapter", progress)
    with stop.deferred():
        adapter = publish_run(release, tensors, model, evaluator, replace(result, served=served))
        if adapter is not None:
            checkpoints.delete_all()
    progress.stage("done")
    return adapter

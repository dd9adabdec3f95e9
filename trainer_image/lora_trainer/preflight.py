"""Everything that can be known of a run before it has a GPU: ``python -m lora_trainer preflight run.json``.

On the CPU, and without the model's weights: its configuration, its tokenizer and the headers of its files are enough.
What is wrong is collected, so that one look tells all of it; a step that needs what failed before it is left out.
"""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lora_api.data import DataReport
from lora_api.failures import FailureClass
from lora_api.preflight import (
    MAX_SHOWN,
    MemoryEstimate,
    ModelFacts,
    Pins,
    PreflightResult,
    Problem,
    RunPlan,
    SourcePin,
)
from lora_api.run import RunSpec
from lora_api.sources import DataSource
from lora_trainer.errors import BadSpecError, classify, describe
from lora_trainer.fitting import build_job, settle, suggest
from lora_trainer.gate import check_gate_has_records
from lora_trainer.headers import Header, count_by_type, count_weights, merge
from lora_trainer.job import Job
from lora_trainer.memory import MemoryPlan, plan_memory
from lora_trainer.modelfiles import ModelFiles, open_model, pin_data, read_headers, read_json_object
from lora_trainer.modelshape import ModelShape, UnplannedModelError, Weights, read_shape
from lora_trainer.rules import RULES
from lora_trainer.rundocument import describe_left_out, parse_document
from lora_trainer.servedplan import plan_served

Result = TypeVar("Result")

MAX_DIFFERENCE = 0.01
"""By how much the weights of the files may differ from those of the configuration before a warning says so."""

HEAD_KEYS = ("namespace", "name", "uid")
NEEDED = {"training": {"maxSteps": 1}}
"""What stands in for a section that is wrong and has no default, so that the other sections can be looked at."""


@dataclass
class Findings:
    """What was found so far."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, failure_class: FailureClass, message: str) -> None:
        """Something that ends the run. Two steps that meet the same thing say it once."""
        problem = Problem(failure_class=failure_class, message=message)
        if problem not in self.problems:
            self.problems.append(problem)

    def attempt(self, step: Callable[[], Result]) -> Result | None:
        """What ``step`` returns, or ``None`` where it failed; why is kept."""
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - classified
            found = classify(error)
            if found == FailureClass.INTERNAL:
                traceback.print_exc()
            self.add(found, describe(error))
            return None


@dataclass(frozen=True)
class Model:
    """What is known of the base model. ``shape`` and ``counted`` are unset where they could not be read."""

    files: ModelFiles
    shape: ModelShape | None
    counted: Weights | None
    facts: ModelFacts | None


def preflight(document: str, where: str, directory: Path, device_gib: float | None = None) -> PreflightResult:
    """Checks the run in ``document``, the JSON text of a RunSpec that came from ``where``.

    ``directory`` is for files. ``device_gib``: memory of one GPU in GiB, where ``device`` of the run does not say it.
    """
    findings = Findings()
    run, broken = read_leniently(document, where, findings)
    model = tokenizer = report = data_digest = start = None
    pins = Pins()
    if run is not None:
        if "baseModel" not in broken:
            model = findings.attempt(lambda: check_model(run, directory / "model", findings))
            tokenizer = None if model is None else findings.attempt(lambda: _read_tokenizer(run, model, findings))
        if "dataset" not in broken:
            report, data_digest, pins = check_data(run, tokenizer, directory, findings)
        if "publish" not in broken:
            findings.attempt(partial(check_store, run))
        for rule in RULES if not broken & {"training", "parallelism", "quantization"} else ():
            findings.attempt(partial(rule, run))
        if report is not None and "publish" not in broken:
            findings.attempt(partial(check_gate_has_records, run, report.eval_records))
    if model is not None:
        pins = pins.model_copy(update={"base_model": model.files.pin})
    plan = None
    if run is not None and not broken & {"training", "parallelism", "lora", "quantization"}:
        device = device_gib if device_gib is not None else (run.device.memory_gib if run.device else None)
        plan = findings.attempt(lambda: plan_run(run, model, report, device, findings))
        if model is not None and not broken & {"publish", "checkpoint"}:
            steps = None if plan is None else plan.total_steps
            start = findings.attempt(lambda: check_start(run, model, steps, data_digest, findings))
    return PreflightResult(
        outcome="failed" if findings.problems else "passed",
        pins=pins,
        model=None if model is None else model.facts,
        plan=plan,
        data=report,
        start=start or None,
        warnings=findings.warnings[:MAX_SHOWN],
        problems=findings.problems[:MAX_SHOWN],
        at=datetime.now(UTC),
    )


def read_leniently(document: str, where: str, findings: Findings) -> tuple[RunSpec | None, set[str]]:
    """The run, with defaults for the sections that are wrong, and the names of those; ``None`` where nothing is left.

    Every wrong field becomes a problem. What a newer version has, and this one leaves out, becomes a warning.
    """
    try:
        reading = parse_document(document)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            path = ".".join(map(str, item["loc"]))
            findings.add(FailureClass.BAD_SPEC, f"{where}: {path + ': ' if path else ''}{item['msg']}")
        broken = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
    else:
        if reading.left_out:
            findings.warnings.append(f"{where}: {describe_left_out(reading.left_out)}")
        return reading.value, set()
    try:
        sections = json.loads(document)
    except (ValueError, RecursionError):
        return None, broken
    if not isinstance(sections, dict):
        return None, broken
    kept = {name: value for name, value in sections.items() if name not in broken}
    fillers = dict.fromkeys(HEAD_KEYS, "unknown") | NEEDED | _unreachable()
    try:
        return parse_document(json.dumps(fillers | kept)).value, broken
    except ValidationError:
        return None, broken


def _unreachable() -> dict[str, Any]:
    """Sections of sources that nobody looks at."""
    nowhere = {"uri": "file:///nowhere"}
    return {"baseModel": nowhere, "dataset": {"train": nowhere}, "publish": {"store": "file:///nowhere"}}


def check_model(run: RunSpec, target: Path, findings: Findings) -> Model:
    """What can be known of the base model without its weights.

    Raises:
        TrainerError: it is not there, or cannot be trained.
    """
    files = open_model(run.base_model, target)
    config = read_json_object(files.directory / "config.json")
    shape = findings.attempt(lambda: _look_inside(config, files.directory, run, findings))
    headers = findings.attempt(lambda: read_headers(files))
    if headers is None:
        return Model(files, shape, None, None)
    tensors = merge(headers)
    counted = None if shape is None else count_weights(tensors, shape)
    if shape is not None and counted is not None:
        _compare(shape, counted, tensors, findings)
    facts = ModelFacts(
        model_type=str(config.get("model_type")),
        parameters=sum(count_by_type(tensors).values()) if counted is None else counted.total,
        parameters_by_type=count_by_type(tensors),
        weight_files=len(headers),
        weight_bytes=sum(files.sizes[name] for name in headers),
    )
    return Model(files, shape, counted, facts)


def _look_inside(config: Mapping[str, Any], directory: Path, run: RunSpec, findings: Findings) -> ModelShape | None:
    """The shape for the memory plan, ``None`` where there is none for this model, whose layers can take the adapter."""
    from lora_trainer.architecture import check_supported, read_architecture, resolve_targets
    from lora_trainer.model import load_skeleton
    from lora_trainer.rows import check_has_rows

    check_supported(config)
    shape = None
    try:
        shape = read_shape(config)
    except UnplannedModelError as error:
        findings.warnings.append(f"memory is not planned: {error}")
    skeleton = load_skeleton(directory)
    architecture = read_architecture(skeleton)
    resolve_targets(architecture, run.lora)
    if architecture.experts:
        findings.warnings.append(_describe_experts(skeleton, architecture, run))
    if run.lora.new_tokens:
        check_has_rows(skeleton)
    return shape


def _compare(shape: ModelShape, counted: Weights, tensors: Header, findings: Findings) -> None:
    if abs(counted.total - shape.total_weights) > MAX_DIFFERENCE * shape.total_weights:
        findings.warnings.append(
            f"the files hold {counted.total:,} weights in {len(tensors)} tensors, and config.json describes "
            f"{shape.total_weights:,}; the plan takes those of the files"
        )


def _describe_experts(skeleton: Any, architecture: Any, run: RunSpec) -> str:
    from lora_trainer.experts import can_pack

    sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    count, total = sum(sizes[name] for name in architecture.experts), sum(sizes.values())
    kind = run.quantization.type
    if kind == "nf4" and all(
        can_pack(skeleton.get_submodule(name.rpartition(".")[0])) for name in architecture.experts
    ):
        held = " and are held in NF4"
    else:
        held = "" if kind == "none" else f" and are not quantized, though quantization.type is {kind}"
    return f"baseModel: {count:,} of {total:,} weights are routed experts: they get no adapter{held}"


def _read_tokenizer(run: RunSpec, model: Model, findings: Findings) -> Any:
    """The tokenizer as the training processes will have it."""
    from lora_trainer.newtokens import describe_cost, read_tokenizer

    tokenizer, tokens = read_tokenizer(run, model.files.directory)
    if tokens.ids:
        findings.warnings.append(describe_cost(run, tokens, model.shape))
    return tokenizer


def check_data(
    run: RunSpec, tokenizer: Any, directory: Path, findings: Findings
) -> tuple[DataReport | None, str | None, Pins]:
    """The records as tokens, their digest, and what the sources held. Without a tokenizer only these are looked at."""
    from lora_trainer.sources import Sources, fetch_data

    files: dict[str, list[Path]] = {}
    pins: dict[str, SourcePin | None] = {"train": None, "eval": None}
    sources: dict[str, DataSource | None] = {"train": run.dataset.train, "eval": run.dataset.eval}
    for name, source in sources.items():
        if source is None:
            continue
        found = findings.attempt(lambda: fetch_data(source, directory / name))  # noqa: B023 - called at once
        if found is not None:
            files[name] = found
            pins[name] = findings.attempt(lambda: pin_data(source, found))  # noqa: B023
    pinned = Pins(train=pins["train"], eval=pins["eval"])
    if tokenizer is None or len(files) < sum(source is not None for source in sources.values()):
        return None, None, pinned
    fetched = Sources(directory / "model", files["train"], files.get("eval"))
    counted = findings.attempt(lambda: _count_tokens(run, fetched, tokenizer, directory / "tokens"))
    if counted is None:
        return None, None, pinned
    findings.warnings += counted[0].warnings
    return *counted, pinned


def _count_tokens(run: RunSpec, sources: Any, tokenizer: Any, directory: Path) -> tuple[DataReport, str]:
    """The records of both sides as the model is given them, cut at maxSeqLength: by what the training processes run."""
    from lora_trainer.origin import digest_data
    from lora_trainer.prepare import prepare_data
    from lora_trainer.settings import Place

    data = prepare_data(run, sources, tokenizer, Place(0, 0, 1), directory)
    return data.report, digest_data(run, data.digest, len(data.train))


def check_store(run: RunSpec) -> None:
    """Writes and deletes a small object where checkpoints will be.

    Raises:
        TrainerError: the store did not take it.
    """
    from lora_trainer.catalog import Catalog
    from lora_trainer.store import Store

    Catalog(Store(run.publish.store), run).check_writable()


def check_start(run: RunSpec, model: Model, steps: int | None, data: str | None, findings: Findings) -> str:
    """What the run goes on from (checkpoint.resumeFrom), in words; nothing where it begins at step 0.

    Raises:
        TrainerError: it cannot go on from there.
    """
    from lora_trainer.origin import describe_base, foresee_start

    start, warning = foresee_start(run, describe_base(model.files.pin), steps, data)
    findings.warnings += [warning] if warning else []
    return start


def plan_run(
    run: RunSpec, model: Model | None, report: DataReport | None, device_gib: float | None, findings: Findings
) -> RunPlan:
    """How the run is trained, and whether it fits on GPUs with ``device_gib`` GiB.

    Raises:
        BadSpecError: batch sizes do not divide, a target module is not there, or nothing fits.
    """
    try:
        batch = run.batch
    except ValueError as error:
        raise BadSpecError(str(error)) from error
    auto = run.training.micro_batch_size == "auto"
    steps = None if report is None else _total_steps(run, report)
    plan = RunPlan(
        micro_batch_size=None if auto else batch.micro_batch_size,
        gradient_accumulation_steps=None if auto else batch.gradient_accumulation_steps,
        processes=run.parallelism.world_size,
        shard_size=1,
        total_steps=steps,
        tokens_per_epoch=None if report is None else report.tokens,
    )
    if model is None or model.shape is None:
        return plan
    on_cpu = run.parallelism.gpus_per_node == 0
    if on_cpu and device_gib is not None:
        findings.warnings.append("parallelism.gpusPerNode is 0: the memory of a GPU is of no use to the plan")
        device_gib = None
    longest = None if report is None or run.dataset.packing else report.longest or None
    job = build_job(run, model.shape, counted=model.counted, longest=longest, device_gib=device_gib)
    settled, complaint = settle(run.training, job, device_gib)
    if settled is None:
        findings.add(FailureClass.BAD_SPEC, complaint)
    elif complaint and device_gib is not None:
        findings.warnings.append(complaint)
    described = _describe_plan(run, plan, settled or job, device_gib, settled=not auto or device_gib is not None)
    if report is not None and not report.eval_records:
        return described
    served = plan_served(run, settled or job, device_gib)
    if served.problem is not None:
        findings.warnings.append(f"publish.servedDtype: {served.to_text()}")
    memory = None if served.memory is None else _estimate(served.memory, device_gib)
    return described.model_copy(update={"served_memory": memory})


def _total_steps(run: RunSpec, report: DataReport) -> int:
    from lora_trainer.trainer import total_steps

    return total_steps(run, report.sequences)


def _describe_plan(run: RunSpec, plan: RunPlan, job: Job, device_gib: float | None, *, settled: bool) -> RunPlan:
    batch = run.with_micro_batch(job.micro_batch).batch
    found = [] if device_gib is None else suggest(job, run.training.global_batch_size, device_gib)
    return plan.model_copy(
        update={
            "micro_batch_size": job.micro_batch if settled else None,
            "gradient_accumulation_steps": batch.gradient_accumulation_steps if settled else None,
            "shard_size": job.shards,
            "memory": _estimate(plan_memory(job), device_gib),
            "suggestions": [one.to_text() for one in found],
        }
    )


def _estimate(memory: MemoryPlan, device_gib: float | None) -> MemoryEstimate:
    return MemoryEstimate(
        estimate_gib=round(memory.total, 3),
        safe_gib=round(memory.safe, 3),
        device_gib=device_gib,
        fits=None if device_gib is None else memory.fits(device_gib),
        parts={name: round(size, 3) for name, size in memory.parts().items()},
    )

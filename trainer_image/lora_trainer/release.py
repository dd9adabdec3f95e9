"""From the trained model to a published version: gate, upload, proof, files for people, manifest, merge, version.

Nothing that a reader looks for (manifest, version) is written before all that it stands for is there and proven.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel

from lora_api.adapter import StoredFile, adapter_prefix, compute_digest, refused_directory
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.adapter import write_adapter
from lora_trainer.card import build_card, build_merged_card
from lora_trainer.chat import template_files
from lora_trainer.errors import GateRefusedError
from lora_trainer.evaluate import Evaluator
from lora_trainer.eventfile import write_event_file
from lora_trainer.gate import decide_gate
from lora_trainer.merge import publish_merged
from lora_trainer.metrics import METRICS_FILE, write_metrics
from lora_trainer.newtokens import tokenizer_files
from lora_trainer.progress import Progress
from lora_trainer.publish import adapter_directory, publish_adapter, publish_version, upload_adapter
from lora_trainer.report import RunResult, build_report
from lora_trainer.seal import make_seal
from lora_trainer.settings import Place
from lora_trainer.store import Store, join
from lora_trainer.verify import fetch_files, verify_published

CARD_FILE, REPORT_FILE = "README.md", "report.html"


@dataclass(frozen=True)
class Release:
    """Where a run is published from and to. ``base`` has the base model's files, ``directory`` is scratch."""

    store: Store
    run: RunSpec
    place: Place
    base: Path
    directory: Path
    progress: Progress


def publish_run(
    release: Release, tensors: Mapping[str, torch.Tensor], model: PeftModel, evaluator: Evaluator, result: RunResult
) -> AdapterStatus | None:
    """Publishes the adapter ``tensors``. All ranks call it; rank 0 returns the adapter, the others ``None``.

    ``model`` holds them: it is the one that was trained, or its base is the one that is served. ``evaluator`` is its
    own.

    Raises:
        GateRefusedError: on rank 0; the adapter is not as good as publish.gate asks, and nothing is published.
        InternalError: it is not a whole adapter, or the store does not give back what was uploaded.
    """
    store, run, place = release.store, release.run, release.place
    losses = result.gate_losses(run.publish.gate)
    refusal = decide_gate(run.publish.gate, losses)
    if refusal is not None:
        if place.is_main:
            raise GateRefusedError(f"{refusal}. Nothing was published; {keep_refused(release, result, refusal)}")
        return None

    files: list[StoredFile] = []

    def upload_and_fetch() -> Path:
        write_adapter(dict(tensors), model, run, release.directory)
        files.extend(upload_adapter(store, run, release.directory))
        return fetch_files(store, adapter_directory(run, compute_digest(files)), files, release.directory / "read-back")

    loss, device, seal = result.proven_loss, evaluator.device, make_seal(run)
    proof = verify_published(model, upload_and_fetch, evaluator.loss, loss, place, device, seal)
    if not place.is_main:
        return None
    extras = write_extras(release, replace(result, verification=proof))
    digest = publish_adapter(store, run, files, extras, result.figures(run.publish.gate), result.versions)
    if run.publish.merge_base:
        card = build_merged_card(run, result)
        alive = partial(release.progress.stage, "publishing")
        publish_merged(store, run, release.directory, release.base, digest, card, alive)
    return publish_version(store, run, digest)


def write_extras(release: Release, result: RunResult) -> list[Path]:
    """Writes the files for people: model card, report, metrics, and TensorBoard's if it is asked for."""
    contents = {
        CARD_FILE: build_card(release.run, result),
        REPORT_FILE: build_report(release.run, result),
        METRICS_FILE: write_metrics(result.metrics),
        **tokenizer_files(release.run, release.base),
        **template_files(release.run.dataset.chat_template),
    }
    release.directory.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (release.directory / name).write_text(text, encoding="utf-8")
    extras = [release.directory / name for name in contents]
    if release.run.tracking.tensorboard:
        extras.append(write_event_file(result.metrics, release.run.name, release.directory))
    return extras


def keep_refused(release: Release, result: RunResult, refusal: str) -> str:
    """Uploads the report and the metrics of a run that the gate refused. Returns where they are, as words."""
    run, store = release.run, release.store
    target = join(adapter_prefix(run.namespace, run.adapter_name), refused_directory(run.uid))
    for source in write_extras(release, replace(result, refusal=refusal)):
        if source.name != CARD_FILE:
            store.upload(source, join(target, source.name))
    return f"its report and metrics are in {store.url(target)}, and its last checkpoint is kept"

"""The checkpoint of another run that this one goes on from (checkpoint.resumeFrom): where it is, and whether it fits.

It is only ever read. The run that wrote it may be alive, gone, or an earlier one of the same name.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_api.adapter import CHECKPOINTS, COMPLETE_FILE, BaseIdentity, CompleteMarker, adapter_prefix
from lora_api.preflight import SourcePin
from lora_api.run import RunSpec
from lora_api.training import LoRA
from lora_trainer.catalog import Catalog, Folder
from lora_trainer.errors import BadSpecError
from lora_trainer.modelfiles import pin_model
from lora_trainer.store import Listed, ObjectNotFoundError, Store, join, split_uri

FIELD = "checkpoint.resumeFrom"

MOST = 20
"""Checkpoints that are tried: a name may have been that of many runs."""

_BELOW = re.compile(r"(?:([^/]+)/)?step-([0-9]{1,10})/" + re.escape(COMPLETE_FILE))
"""A marker below the folder of a run, or below one of several of them."""

_FREE = {"dropout"}
"""Of lora: what a run may have otherwise than the one it goes on from. All else is the adapter's shape and meaning."""


@dataclass(frozen=True)
class Identity:
    """What a run writes into its checkpoints of itself. ``data`` is a digest of what is learned from, in its order."""

    base: BaseIdentity
    data: str

    def to_marker(self, run: RunSpec) -> dict[str, Any]:
        """As fields of CompleteMarker."""
        return {
            "run": run.name,
            "base_model": self.base,
            "lora": run.lora.to_wire(),
            "objective": run.training.objective,
            "optimizer": run.training.optimizer,
            "data": self.data,
            "retain_hours": run.checkpoint.retained_hours,
        }


@dataclass(frozen=True)
class Origin:
    """A complete checkpoint that the run may go on from."""

    folder: Folder
    marker: CompleteMarker

    @property
    def url(self) -> str:
        """Where it is."""
        return self.folder.url(self.marker.step)


def identify_base(run: RunSpec, model: Path) -> BaseIdentity:
    """The base model of ``run``, whose files are in ``model``: as its preflight pinned it, else as it is found now.

    Raises:
        TrainerError: the store does not say what it holds.
    """
    pin = run.pins.base_model if run.pins is not None else None
    if pin is not None:
        return describe_base(pin)
    if split_uri(run.base_model.uri)[0] == "hf":
        return BaseIdentity(uri=run.base_model.uri, revision=model.name)  # the hub's cache has a directory a commit
    return describe_base(pin_model(run.base_model, model))


def describe_base(pin: SourcePin) -> BaseIdentity:
    """What a pin says of the base model."""
    return BaseIdentity(uri=pin.uri, revision=pin.revision, digest=pin.digest)


def digest_data(run: RunSpec, tokens: str, sequences: int) -> str:
    """A digest of what is learned from: ``tokens`` is that of all records, of which ``sequences`` are made."""
    parts = [tokens, sequences, run.dataset.packing, run.dataset.max_seq_length]
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_origins(run: RunSpec, store: Store) -> list[Origin]:
    """The complete checkpoints that ``resumeFrom`` of ``run`` names, the best first; none without a ``resumeFrom``.

    Of several runs the one whose newest checkpoint is the newest comes first, by the store's clock: those of the pods
    that wrote them may differ. Checkpoints of this run itself are not among them.

    Raises:
        TrainerError: the store cannot be read.
    """
    if run.checkpoint.resume_from is None:
        return []
    place, prefix, only = _locate(run, store)
    try:
        listing = place.listing(prefix)
    except ObjectNotFoundError as error:
        raise BadSpecError(f"{FIELD}: {place.url(prefix)}: there is no such bucket") from error
    sizes = {path: entry.size for path, entry in listing.items()}
    found = []
    for folder in sorted(_find_times(listing, prefix).items(), key=lambda item: item[1], reverse=True):
        uid = folder[0]
        if uid != run.uid:
            one = Folder(place, join(prefix, uid))
            found += [Origin(one, marker) for marker in one.complete_ones(sizes) if only in (None, marker.step)]
        if len(found) >= MOST:
            break
    return found[:MOST]


def find_beginning(store: Store, run: RunSpec) -> CompleteMarker | None:
    """Marker of the checkpoint that an attempt of ``run`` goes on from, its own or another one, as far as is known."""
    own = Catalog(store, run).find()
    return own or next((origin.marker for origin in find_origins(run, store)), None)


def _find_times(listing: Mapping[str, Listed], prefix: str) -> dict[str, datetime]:
    """When the newest checkpoint of each run was complete. The name is empty where ``prefix`` is that of one run."""
    inside, times = f"{prefix}/" if prefix else "", dict[str, datetime]()
    for path, entry in listing.items():
        match = _BELOW.fullmatch(path.removeprefix(inside))
        if match is not None:
            uid = match.group(1) or ""
            times[uid] = max(times.get(uid, entry.modified), entry.modified)
    return times


def _locate(run: RunSpec, store: Store) -> tuple[Store, str, int | None]:
    """The store and the path below which to look, and the step if one is named."""
    wanted = run.checkpoint.resume_from
    if wanted is None or wanted.uri is None:
        name = "" if wanted is None or wanted.name is None else wanted.name
        return store, join(adapter_prefix(run.namespace, name), CHECKPOINTS), None
    parent, _, last = wanted.uri.rstrip("/").rpartition("/")
    step = re.fullmatch(r"step-([0-9]{1,10})", last)
    return (Store(wanted.uri), "", None) if step is None else (Store(parent), "", int(step.group(1)))


def describe_place(run: RunSpec, store: Store) -> str:
    """Where ``find_origins`` looks."""
    place, prefix, step = _locate(run, store)
    return place.url(join(prefix, "" if step is None else f"step-{step}"))


def names_folder(run: RunSpec, store: Store, folder: str) -> bool:
    """Whether ``resumeFrom`` names the checkpoints at the URI ``folder``, one of them, or what they are below."""
    if run.checkpoint.resume_from is None:
        return False
    place = f"{describe_place(run, store)}/"
    return place.startswith(f"{folder}/") or f"{folder}/".startswith(place)


def describe_nothing(run: RunSpec, store: Store, damaged: int) -> str:
    """What to say where ``find_origins`` found nothing, or only ``damaged`` checkpoints."""
    what = f"each of the {damaged} checkpoints is damaged" if damaged else "there is no complete checkpoint"
    hint = (
        "name is that of a LoRAFineTune of this namespace that published to the same store, or its publish.name; its "
        "checkpoints are deleted once it has published"
        if run.checkpoint.resume_from is not None and run.checkpoint.resume_from.name is not None
        else "uri has to end in checkpoints, in checkpoints/UID or in checkpoints/UID/step-N"
    )
    return f"{FIELD}: {what} below {describe_place(run, store)}; {hint}"


def find_misfit(run: RunSpec, origin: Origin, base: BaseIdentity, total_steps: int | None) -> str:
    """Why ``run``, of ``total_steps`` in all on the model ``base``, cannot go on from ``origin``; else nothing."""
    marker, where = origin.marker, f"{FIELD}: {origin.url}"
    if marker.base_model is None or marker.lora is None:
        return (
            f"{where} was saved by a trainer of an older version, which did not write down the base model and the "
            "shape of the adapter, so that nobody knows whether they fit; take another checkpoint, or leave "
            "resumeFrom out"
        )
    if not marker.base_model.is_same(base):
        return (
            f"{where} was trained on the base model {marker.base_model.to_text()}, and baseModel is {base.to_text()}; "
            "set baseModel to that one, or leave resumeFrom out"
        )
    differences = list(_differences(run, marker))
    if differences:
        then = ", ".join(f"{path} {json.dumps(saved)}" for path, saved, _ in differences)
        now = ", ".join(f"{path} {json.dumps(own)}" for path, _, own in differences)
        return f"{where} was made with {then}, this run has {now}; set it as it was, or leave resumeFrom out"
    if total_steps is not None and marker.step >= total_steps:
        return (
            f"{where} is of step {marker.step}, and this run has {total_steps} steps, counted from the beginning of "
            "the one that it goes on from: raise training.maxSteps or training.epochs"
        )
    return ""


def _differences(run: RunSpec, marker: CompleteMarker) -> Iterator[tuple[str, Any, Any]]:
    """Path, value in the checkpoint and value of ``run`` of all that has to be the same and is not."""
    saved, own, usual = marker.lora or {}, run.lora.to_wire(), LoRA().to_wire()
    for name in sorted((saved.keys() | own.keys()) - _FREE):
        then, now = saved.get(name, usual.get(name)), own.get(name, usual.get(name))
        same = sorted(then) == sorted(now) if name == "targetModules" and isinstance(then, list) else then == now
        if not same:
            yield f"lora.{name}", then, now
    training = run.training
    for path, then, now in (
        ("training.objective", marker.objective, training.objective),
        ("training.optimizer", marker.optimizer, training.optimizer),
        ("training.globalBatchSize", marker.global_batch_size, training.global_batch_size),
        ("training.seed", marker.seed, training.seed),
    ):
        if then is not None and then != now:
            yield path, then, now


def describe_start(origin: Origin) -> str:
    """What a run says that begins there."""
    return f"goes on from step {origin.marker.step} of {origin.url} ({FIELD})"


def find_other_data(origin: Origin, data: str) -> str:
    """A warning where the checkpoint was made with other records than those with the digest ``data``; else nothing."""
    if origin.marker.data in (None, data):
        return ""
    return (
        f"{FIELD}: dataset is not what {origin.url} was trained on: the run goes on at step {origin.marker.step + 1} "
        "in the order of the new records, and leaves out as many of them as the steps before would have taken"
    )


def foresee_start(run: RunSpec, base: BaseIdentity, total_steps: int | None, data: str | None) -> tuple[str, str]:
    """For a preflight: what the run begins with, and a warning; neither, where it begins at step 0 or has begun.

    Whether the files are whole is seen when they are read.

    Raises:
        BadSpecError: there is no checkpoint, or it does not fit.
        TrainerError: the store cannot be read.
    """
    store = Store(run.publish.store)
    if run.checkpoint.resume_from is None or Catalog(store, run).find() is not None:
        return "", ""
    origins = find_origins(run, store)
    if not origins:
        raise BadSpecError(describe_nothing(run, store, 0))
    misfit = find_misfit(run, origins[0], base, total_steps)
    if misfit:
        raise BadSpecError(misfit)
    return describe_start(origins[0]), "" if data is None else find_other_data(origins[0], data)

"""What deleted runs have left in the store: whose checkpoints they are, until when they are kept, and their deletion.

Two times are compared, both by the store's clock: that at which an object was written, and that of an object that is
written to learn the time. The clock of the node that wrote a checkpoint may be hours off; ``expiresAt``, which is by
that clock, can only make it be kept for longer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from lora_api.adapter import CHECKPOINTS, COMPLETE_FILE, EXPIRES_FILE, CompleteMarker, ExpiryMarker, adapter_prefix
from lora_api.run import RunSpec
from lora_trainer.catalog import delete_step, group_by_step
from lora_trainer.origin import names_folder
from lora_trainer.store import Listed, ObjectNotFoundError, Store, join

_FOLDER = re.compile(rf"([^/]+/[^/]+/{CHECKPOINTS}/([^/]+))/.+")
_MOST_HOURS = 1_000_000

Marker = TypeVar("Marker", bound=BaseModel)


@dataclass(frozen=True)
class Remains:
    """All that lies in the folder of one run's checkpoints, by path."""

    prefix: str
    uid: str
    objects: Mapping[str, Listed]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.objects.values())

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints."""
        by_step = group_by_step(self.objects, self.prefix)
        return sorted(step for step, paths in by_step.items() if any(path.endswith(COMPLETE_FILE) for path in paths))


@dataclass(frozen=True)
class Keeping:
    """Until when a run's checkpoints are kept, and the name of the run, where it says one."""

    until: datetime
    run: str | None = None


def find_remains(listing: Mapping[str, Listed]) -> list[Remains]:
    """The folders of runs in the listing of a store, or of a part of it."""
    folders: dict[tuple[str, str], dict[str, Listed]] = {}
    for path, entry in listing.items():
        match = _FOLDER.fullmatch(path)
        if match is not None:
            folders.setdefault((match.group(1), match.group(2)), {})[path] = entry
    return [Remains(prefix, uid, objects) for (prefix, uid), objects in folders.items()]


def read_keeping(store: Store, remains: Remains, hours: int) -> Keeping:
    """Until when ``remains`` are kept: until the last of its complete checkpoints has expired.

    One without EXPIRES.json, of a run that ended without having written it, is kept for the hours that its marker says,
    else ``hours``, from when it was complete. Without any complete one that holds of the newest object.
    """
    complete = {path: entry for path, entry in remains.objects.items() if path.endswith(f"/{COMPLETE_FILE}")}
    expiries = {path: entry for path, entry in remains.objects.items() if path.endswith(f"/{EXPIRES_FILE}")}
    found = []
    for path, entry in complete.items() or expiries.items():
        beside = f"{path.rpartition('/')[0]}/{EXPIRES_FILE}"
        expiry = _read(store, beside, ExpiryMarker) if beside in expiries else None
        if expiry is not None:
            until = max(expiry.expires_at, _after(expiries[beside].modified, expiry.retain_hours))
            found.append(Keeping(until, expiry.run))
            continue
        marker = _read(store, path, CompleteMarker) if path in complete else None
        kept = hours if marker is None else marker.retain_hours or hours
        found.append(Keeping(_after(entry.modified, kept), None if marker is None else marker.run))
    if not found:
        newest = max(entry.modified for entry in remains.objects.values())
        return Keeping(_after(newest, hours))
    runs = {one.run for one in found}
    return Keeping(max(one.until for one in found), runs.pop() if len(runs) == 1 else None)


def _after(moment: datetime, hours: int) -> datetime:
    return moment + timedelta(hours=min(hours, _MOST_HOURS))


def _read(store: Store, path: str, model: type[Marker]) -> Marker | None:
    """The marker at ``path``; ``None`` if it is gone, or none of ours."""
    try:
        return model.model_validate_json(store.get(path))
    except (ObjectNotFoundError, ValidationError):
        return None


def delete_remains(store: Store, remains: Remains) -> None:
    """Deletes the folder, its oldest checkpoint first: one that is cut goes on to say whose the rest is."""
    by_step = group_by_step(remains.objects, remains.prefix)
    for _, paths in sorted(by_step.items()):
        delete_step(store, paths)
    others = remains.objects.keys() - {path for paths in by_step.values() for path in paths}
    store.delete(sorted(others))


def sweep(
    store: Store,
    candidates: Iterable[Remains],
    now: datetime,
    hours: int,
    wanted: Callable[[Remains, Keeping], bool] = lambda *_: True,
    *,
    dry: bool = False,
) -> Iterator[tuple[Remains, Keeping, bool]]:
    """Deletes those of ``candidates`` that have expired and are ``wanted`` gone; says of each whether it did.

    Each is listed again before it goes: an attempt that has begun meanwhile has taken its expiry back.
    """
    for remains in candidates:
        keeping = read_keeping(store, remains, hours)
        gone = keeping.until < now and wanted(remains, keeping)
        if gone and not dry:
            again = Remains(remains.prefix, remains.uid, store.listing(remains.prefix))
            if again.objects and again.objects != remains.objects:
                remains, keeping = again, read_keeping(store, again, hours)
                gone = keeping.until < now and wanted(remains, keeping)
            if gone:
                delete_remains(store, remains)
        yield remains, keeping, gone


def sweep_name(store: Store, run: RunSpec, probe: str) -> list[str]:
    """Deletes the expired checkpoints of deleted runs that had the name of ``run``. Says which.

    No two LoRAFineTunes of a namespace have one name, so another uid with it is of a run that is gone. Those of other
    names, which publish.name can lead to the same place, may be alive: they, and what says no name, are left to
    ``lora_trainer sweep``. So is what ``resumeFrom`` names. ``probe``: path of the object that tells the time.
    """
    root = join(adapter_prefix(run.namespace, run.adapter_name), CHECKPOINTS)
    others = [one for one in find_remains(store.listing(root)) if one.uid != run.uid]
    others = [one for one in others if not names_folder(run, store, store.url(one.prefix))]
    if not others:
        return []
    found = sweep(
        store, others, store.now(probe), run.checkpoint.retained_hours, lambda _, keeping: keeping.run == run.name
    )
    return [describe_deleted(store, remains, keeping) for remains, keeping, gone in found if gone]


def describe_deleted(store: Store, remains: Remains, keeping: Keeping) -> str:
    """A line for people."""
    return f"{store.url(remains.prefix)}: {_contents(remains)}, expired {_minute(keeping.until)}"


def describe_kept(store: Store, remains: Remains, keeping: Keeping) -> str:
    """A line for people."""
    return f"{store.url(remains.prefix)}: {_contents(remains)}, kept until {_minute(keeping.until)}"


def _contents(remains: Remains) -> str:
    steps = ", ".join(map(str, remains.steps))
    return f"{f'step {steps}' if steps else 'nothing complete'}, {remains.size / 1e6:,.1f} MB"


def _minute(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")

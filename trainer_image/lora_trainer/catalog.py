"""The checkpoints of a run as they lie in the store: which are complete, which may go. Knows nothing of tensors.

    STORE/NAMESPACE/NAME/checkpoints/UID/step-N/...    COMPLETE.json last

A kill between any two operations on the store leaves a state to go on from: files come before the marker that names
them, and the marker goes before the files that it names. One without COMPLETE.json, or with a file that is not as
COMPLETE.json says, does not exist.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from lora_api.adapter import (
    COMPLETE_FILE,
    EXPIRES_FILE,
    CompleteMarker,
    ExpiryMarker,
    StoredFile,
    adapter_prefix,
    checkpoints_directory,
    parse_checkpoint_step,
    step_directory,
)
from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.store import ObjectNotFoundError, Store, describe_file, file_digest, join


class Folder:
    """The checkpoints of one run, whichever, below ``prefix`` of ``store``. Only read."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    def path(self, step: int, name: str = "") -> str:
        """Path of the checkpoint of ``step``, or of one of its files."""
        return join(self.prefix, step_directory(step), name)

    def url(self, step: int) -> str:
        """Full URI of the checkpoint of ``step``."""
        return self.store.url(self.path(step))

    def complete_ones(self, sizes: Mapping[str, int] | None = None) -> list[CompleteMarker]:
        """Markers of the complete checkpoints, newest first. Sizes are compared, digests only by ``fetch``.

        ``sizes`` are those of all objects, if they are known already.
        """
        return list(self._complete(self.store.sizes(self.prefix) if sizes is None else sizes))

    def find(self) -> CompleteMarker | None:
        """Marker of the newest complete checkpoint."""
        return next(self._complete(self.store.sizes(self.prefix)), None)

    def _complete(self, sizes: Mapping[str, int]) -> Iterator[CompleteMarker]:
        for step, paths in sorted(group_by_step(sizes, self.prefix).items(), reverse=True):
            if self.path(step, COMPLETE_FILE) not in paths:
                continue
            try:
                marker = CompleteMarker.model_validate_json(self.store.get(self.path(step, COMPLETE_FILE)))
            except (ValidationError, ObjectNotFoundError):
                continue
            whole = all(sizes.get(self.path(step, file.path)) == file.size for file in marker.files)
            if marker.step == step and whole:
                yield marker

    def fetch(self, marker: CompleteMarker, names: Iterable[str], target: Path) -> str | None:
        """Copies the files ``names`` of a checkpoint to ``target``, those of them that it has.

        Returns what is wrong with a file. It is fetched twice before that is said, which tells a bad line from a bad
        file.
        """
        wanted = set(names)
        for file in marker.files:
            if file.path in wanted:
                problem = self._fetch(marker, file, target) and self._fetch(marker, file, target)
                if problem is not None:
                    return problem
        return None

    def _fetch(self, marker: CompleteMarker, file: StoredFile, target: Path) -> str | None:
        path = self.path(marker.step, file.path)
        try:
            self.store.download(path, target / file.path, file.size)
        except ObjectNotFoundError as error:
            return str(error)
        if file_digest(target / file.path) != file.sha256:
            return f"{self.store.url(path)}: its SHA-256 is not as it was written"
        return None


class Catalog(Folder):
    """The checkpoints of ``run`` in ``store``."""

    def __init__(self, store: Store, run: RunSpec) -> None:
        root = adapter_prefix(run.namespace, run.adapter_name)
        super().__init__(store, join(root, checkpoints_directory(run.uid)))
        self._run = run

    # -- writing

    def check_writable(self) -> None:
        """Writes and deletes a small object, so that credentials that may only read end the run before training."""
        path = join(self.prefix, "probe")
        try:
            self.store.put(path, b"probe")
        except ObjectNotFoundError as error:
            raise BadSpecError(f"publish.store: {self._run.publish.store}: there is no such bucket") from error
        self.store.delete([path])

    def begin(self, step: int) -> None:
        """Before files of ``step`` are written: a damaged checkpoint of that step must not look complete half-way."""
        self.store.delete([self.path(step, COMPLETE_FILE)])

    def upload(self, step: int, file: Path) -> StoredFile:
        """Copies ``file`` into the checkpoint of ``step``. Returns its entry for the marker."""
        self.store.upload(file, self.path(step, file.name))
        return describe_file(file, file.name)

    def complete(self, marker: CompleteMarker) -> None:
        """Makes the checkpoint that ``marker`` describes count."""
        content = json.dumps(marker.to_wire(), indent=1)
        self.store.put(self.path(marker.step, COMPLETE_FILE), content.encode())

    def prune(self) -> None:
        """Deletes all but the newest ``checkpoint.kept`` complete checkpoints, and incomplete ones older than those.

        One with a file of another size is not complete, so that a damaged one never pushes out a good one. Where only
        one is kept, it is read back first: what was damaged on the way must not become the only one.
        """
        sizes = self.store.sizes(self.prefix)
        by_step, keep = group_by_step(sizes, self.prefix), self._run.checkpoint.kept
        kept = list(islice(self._complete(sizes), keep))
        steps = {marker.step for marker in kept}
        older = sorted(step for step in by_step if kept and step < kept[0].step and step not in steps)
        if older and keep == 1 and not self._is_sound(kept[0]):
            return
        for step in older:
            delete_step(self.store, by_step[step])

    def delete_all(self) -> None:
        """Deletes every checkpoint of the run, newest last, so that a cut leaves the newest."""
        for _, paths in sorted(group_by_step(self.store.sizes(self.prefix), self.prefix).items()):
            delete_step(self.store, paths)

    def condemn(self, step: int) -> None:
        """Makes a damaged checkpoint not count any more. Its files stay until newer ones push them out."""
        self.store.delete([self.path(step, COMPLETE_FILE)])

    def expire(self, expiry: ExpiryMarker) -> int:
        """Writes ``expiry`` beside the marker of each checkpoint. Returns how many there are."""
        complete = [path for path in self.store.sizes(self.prefix) if path.endswith("/" + COMPLETE_FILE)]
        content = json.dumps(expiry.to_wire(), indent=1).encode()
        for path in complete:
            self.store.put(path.removesuffix(COMPLETE_FILE) + EXPIRES_FILE, content)
        return len(complete)

    def unexpire(self) -> None:
        """Takes back what ``expire`` wrote."""
        self.store.delete(path for path in self.store.sizes(self.prefix) if path.endswith("/" + EXPIRES_FILE))

    # -- reading

    def check_same_run(self, marker: CompleteMarker) -> None:
        """Raises BadSpecError where the checkpoint was made with another global batch size or seed than this run's."""
        training, where = self._run.training, self.store.url(self.path(marker.step, COMPLETE_FILE))
        for name, saved, own in (
            ("globalBatchSize", marker.global_batch_size, training.global_batch_size),
            ("seed", marker.seed, training.seed),
        ):
            if saved is not None and saved != own:
                raise BadSpecError(
                    f"{where}: the checkpoint was made with training.{name} {saved}, this run has {own}. A run's "
                    "specification does not change, so something else has written there: delete the checkpoints, or "
                    "create the run under another name"
                )

    def _is_sound(self, marker: CompleteMarker) -> bool:
        with TemporaryDirectory() as scratch:
            return self.fetch(marker, [file.path for file in marker.files], Path(scratch)) is None


def delete_step(store: Store, paths: Iterable[str]) -> None:
    """Deletes the objects of one checkpoint: first COMPLETE.json, and last what says whose it was and until when."""
    order = {COMPLETE_FILE: 0, EXPIRES_FILE: 2}
    store.delete(sorted(paths, key=lambda path: order.get(path.rpartition("/")[2], 1)))


def group_by_step(paths: Iterable[str], prefix: str) -> dict[int, list[str]]:
    """Paths of each checkpoint of the run whose checkpoints are below ``prefix``, by its step."""
    groups: dict[int, list[str]] = {}
    inside = f"{prefix}/" if prefix else ""
    for path in paths:
        step = parse_checkpoint_step(path.removeprefix(inside)) if path.startswith(inside) else None
        if step is not None:
            groups.setdefault(step, []).append(path)
    return groups

"""The checkpoints of a run as they lie in the store: which are complete, which may go. Knows nothing of tensors.

    STORE/NAMESPACE/NAME/checkpoints/UID/step-N/...    COMPLETE.json last

A kill between any two operations on the store leaves a state to go on from: files come before the marker that names
them, and the marker goes before the files that it names. One without COMPLETE.json, or with a file that is not as
COMPLETE.json says, does not exist.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from lora_api.adapter import (
    COMPLETE_FILE,
    CompleteMarker,
    StoredFile,
    adapter_prefix,
    checkpoint_directory,
    checkpoints_directory,
    parse_checkpoint_step,
)
from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.store import ObjectNotFoundError, Store, describe_file, file_digest, join


class Catalog:
    """The checkpoints of ``run`` in ``store``."""

    def __init__(self, store: Store, run: RunSpec) -> None:
        root = adapter_prefix(run.namespace, run.adapter_name)
        self.prefix = join(root, checkpoints_directory(run.uid))
        self._store, self._run, self._root = store, run, root

    def path(self, step: int, name: str = "") -> str:
        """Path of the checkpoint of ``step``, or of one of its files."""
        return join(self._root, checkpoint_directory(self._run.uid, step), name)

    # -- writing

    def check_writable(self) -> None:
        """Writes and deletes a small object, so that credentials that may only read end the run before training."""
        path = join(self.prefix, "probe")
        try:
            self._store.put(path, b"probe")
        except ObjectNotFoundError as error:
            raise BadSpecError(f"publish.store: {self._run.publish.store}: there is no such bucket") from error
        self._store.delete([path])

    def begin(self, step: int) -> None:
        """Before files of ``step`` are written: a damaged checkpoint of that step must not look complete half-way."""
        self._store.delete([self.path(step, COMPLETE_FILE)])

    def upload(self, step: int, file: Path) -> StoredFile:
        """Copies ``file`` into the checkpoint of ``step``. Returns its entry for the marker."""
        self._store.upload(file, self.path(step, file.name))
        return describe_file(file, file.name)

    def complete(self, marker: CompleteMarker) -> None:
        """Makes the checkpoint that ``marker`` describes count."""
        content = json.dumps(marker.to_wire(), indent=1)
        self._store.put(self.path(marker.step, COMPLETE_FILE), content.encode())

    def prune(self) -> None:
        """Deletes all but the newest ``checkpoint.kept`` complete checkpoints, and incomplete ones older than those.

        One with a file of another size is not complete, so that a damaged one never pushes out a good one. Where only
        one is kept, it is read back first: what was damaged on the way must not become the only one.
        """
        sizes = self._store.sizes(self.prefix)
        by_step, keep = group_by_step(sizes), self._run.checkpoint.kept
        kept = list(islice(self._complete(sizes), keep))
        steps = {marker.step for marker in kept}
        older = sorted(step for step in by_step if kept and step < kept[0].step and step not in steps)
        if older and keep == 1 and not self._is_sound(kept[0]):
            return
        for step in older:
            self._delete_step(by_step[step])

    def delete_all(self) -> None:
        """Deletes every checkpoint of the run, newest last, so that a cut leaves the newest."""
        for _, paths in sorted(group_by_step(self._store.sizes(self.prefix)).items()):
            self._delete_step(paths)

    def condemn(self, step: int) -> None:
        """Makes a damaged checkpoint not count any more. Its files stay until newer ones push them out."""
        self._store.delete([self.path(step, COMPLETE_FILE)])

    def _delete_step(self, paths: list[str]) -> None:
        self._store.delete(sorted(paths, key=lambda path: not path.endswith("/" + COMPLETE_FILE)))

    # -- reading

    def complete_ones(self) -> list[CompleteMarker]:
        """Markers of the complete checkpoints, newest first. Sizes are compared, digests only by ``fetch``."""
        return list(self._complete(self._store.sizes(self.prefix)))

    def find(self) -> CompleteMarker | None:
        """Marker of the newest complete checkpoint."""
        return next(self._complete(self._store.sizes(self.prefix)), None)

    def _complete(self, sizes: dict[str, int]) -> Iterator[CompleteMarker]:
        for step, paths in sorted(group_by_step(sizes).items(), reverse=True):
            if self.path(step, COMPLETE_FILE) not in paths:
                continue
            try:
                marker = CompleteMarker.model_validate_json(self._store.get(self.path(step, COMPLETE_FILE)))
            except (ValidationError, ObjectNotFoundError):
                continue
            whole = all(sizes.get(self.path(step, file.path)) == file.size for file in marker.files)
            if marker.step == step and whole:
                yield marker

    def check_same_run(self, marker: CompleteMarker) -> None:
        """Raises BadSpecError where the checkpoint was made with another global batch size or seed than this run's."""
        training, where = self._run.training, self._store.url(self.path(marker.step, COMPLETE_FILE))
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
            self._store.download(path, target / file.path, file.size)
        except ObjectNotFoundError as error:
            return str(error)
        if file_digest(target / file.path) != file.sha256:
            return f"{self._store.url(path)}: its SHA-256 is not as it was written"
        return None

    def _is_sound(self, marker: CompleteMarker) -> bool:
        with TemporaryDirectory() as scratch:
            return self.fetch(marker, [file.path for file in marker.files], Path(scratch)) is None


def group_by_step(paths: Iterable[str]) -> dict[int, list[str]]:
    """Paths of each checkpoint, by its step."""
    groups: dict[int, list[str]] = {}
    for path in paths:
        step = parse_checkpoint_step(path)
        if step is not None:
            groups.setdefault(step, []).append(path)
    return groups

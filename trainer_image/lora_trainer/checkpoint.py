"""Checkpoints: the state of a run after a step, saved to and restored from the store by all ranks together.

A checkpoint holds what the weights after it depend on: the adapter, the optimizer's state, the learning rate's
schedule, the random states of every rank and the trainer's own state (step, history). Tensors are whole, not sharded,
so that a run can go on with another number of processes; only the random states of dropout are lost by that. No file
is a pickle. ``catalog`` says how they lie in the store.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Container
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lora_api.adapter import CompleteMarker, StoredFile
from lora_api.run import RunSpec
from lora_trainer.catalog import Catalog, Folder
from lora_trainer.checkpointfiles import (
    ADAPTER_STATE,
    LOOP_STATE,
    OBJECTIVE_STATE,
    OPTIMIZER_STATE,
    SHARED,
    TRAINER_STATE,
    Resume,
    find_odd_state,
    place_schedule,
    read_resume,
    rng_file,
    take_logging_steps,
)
from lora_trainer.damage import find_damage
from lora_trainer.errors import BadSpecError, InternalError, StoreUnavailableError
from lora_trainer.evaluate import Evaluation
from lora_trainer.exchange import broadcast_json, gather_json
from lora_trainer.optim import collect_state, restore_state
from lora_trainer.origin import (
    Identity,
    Origin,
    describe_nothing,
    describe_start,
    find_misfit,
    find_origins,
    find_other_data,
)
from lora_trainer.parallel import assign_full, full_tensor
from lora_trainer.progress import Progress
from lora_trainer.rng import read_rng_state, restore_rng_state
from lora_trainer.settings import Place, stop_grace_seconds
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store, join
from lora_trainer.sweep import sweep_name

if TYPE_CHECKING:
    from lora_trainer.trainer import LoRATrainer

MAX_FAILED_SAVES = 3
"""So many checkpoints in a row may fail for want of the store before the run ends."""

SWEEP_SECONDS = 30.0
"""How long the deletion of what deleted runs have left may hold up an attempt."""

STOP_MARGIN_SECONDS = 2.0
"""What is left of the grace period, after the last checkpoint, to end in."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        store: Store,
        run: RunSpec,
        place: Place,
        directory: Path,
        progress: Progress,
        stop: StopRequest | None = None,
        clock: Callable[[], float] = time.monotonic,
        identity: Identity | None = None,
    ) -> None:
        self.catalog = Catalog(store, run)
        self.before: Evaluation | None = None
        self.resumed_from: str | None = None
        """The checkpoint of another run that this one began with."""
        self._identity = identity
        """Rank 0 has it, which writes the markers."""
        self._origin: Path | None = None
        self._saved: int | None = None
        self.failures = 0
        """Checkpoints in a row that could not be saved."""
        self._store, self._run, self._place, self._progress = store, run, place, progress
        self._directory = directory
        self._stopping = False
        self._stop, self._clock, self._tried_at = stop or StopRequest(), clock, clock()

    @property
    def saved(self) -> int | None:
        """Step of the newest complete checkpoint that this process knows of."""
        return self._saved

    def _note_saved(self, step: int) -> None:
        """A checkpoint is complete. From now on every line of progress says so, and the last words do."""
        self._saved = self._progress.checkpoint_step = step

    # -- writing

    def check_writable(self) -> None:
        """Lets rank 0 prove that it may write to the store, before training."""
        if self._place.is_main:
            self.catalog.check_writable()

    def delete_all(self) -> None:
        """Deletes every checkpoint of the run."""
        self.catalog.delete_all()

    def tidy(self) -> None:
        """Lets rank 0 take back until when the checkpoints were to be kept, and delete those of deleted runs.

        The second is a favour to the store: what hinders it is said, and hinders nothing else.
        """
        if not self._place.is_main:
            return
        self.catalog.unexpire()
        patience = min(SWEEP_SECONDS, self._run.parallelism.collective_timeout_seconds * 0.5)
        try:
            with self._store.within(patience):
                for line in sweep_name(self._store, self._run, join(self.catalog.prefix, "probe")):
                    self._progress.note(f"deleted the checkpoints of a deleted run of this name: {line}")
        except Exception as error:  # noqa: BLE001
            sys.stderr.write(f"what deleted runs of this name have left could not be deleted: {str(error)[:500]}\n")

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after ``step``. Rank 0's word counts, because it may depend on a clock."""
        policy, since = self._run.checkpoint, self._clock() - self._tried_at
        if self.failures:
            return since >= self._store.retry_seconds
        if policy.steps is not None and step % policy.steps == 0:
            return True
        return policy.every_minutes is not None and since >= policy.every_minutes * 60

    def save(self, trainer: "LoRATrainer") -> None:
        """Saves the state after the current step. All ranks call it; it returns when the checkpoint is complete.

        A store that fails does not end the run at once: the older checkpoint is still there, and the next is tried
        soon. The last one of a run is tried until it is there.

        Raises:
            StoreUnavailableError: MAX_FAILED_SAVES checkpoints in a row could not be saved.
        """
        step = int(trainer.state.global_step)
        if step == self.saved:
            return
        self._progress.stage("checkpointing")
        while (problem := self._try_to_save(trainer, step)) is not None:
            self._count_failure(step, problem)
            if step < trainer.args.max_steps or self._stopping:
                break
        self._progress.stage("training")

    def _patience(self) -> float:
        """Seconds that a checkpoint may take: what is left of the grace period, and less than peers wait for it."""
        seconds = self._run.parallelism.collective_timeout_seconds * 0.8
        if self._stop.asked_at is not None:
            left = self._stop.asked_at + stop_grace_seconds() - STOP_MARGIN_SECONDS - time.monotonic()
            seconds = min(seconds, max(left, 1.0))
        return seconds

    def _count_failure(self, step: int, problem: str) -> None:
        self.failures += 1
        last = "there is none yet" if self.saved is None else f"the last one is of step {self.saved}"
        if self._place.is_main:
            sys.stderr.write(f"the checkpoint of step {step} could not be saved, {last}: {problem}\n")
        if self.failures >= MAX_FAILED_SAVES and not self._stopping:
            raise StoreUnavailableError(
                f"{self.failures} checkpoints in a row could not be saved; {last}, and the next attempt goes on from "
                f"it: {problem}"
            )

    def _try_to_save(self, trainer: "LoRATrainer", step: int) -> str | None:
        """One try. Returns why there is no checkpoint, the same on all ranks; ``None`` when it is complete."""
        local = self._directory / f"step-{step}-rank-{self._place.rank}"
        local.mkdir(parents=True, exist_ok=True)
        names = self._write_shared(trainer, local)
        (local / rng_file(self._place.rank)).write_text(json.dumps(read_rng_state()))
        names.append(rng_file(self._place.rank))
        files: list[StoredFile] = []
        with self._store.within(self._patience()):
            main = self._place.is_main
            problem = self._agree(self._attempt(lambda: self.catalog.begin(step)) if main else None)
            if problem is None:
                problem = self._attempt(lambda: files.extend(self.catalog.upload(step, local / name) for name in names))
            listed = gather_json([file.to_wire() for file in files])
            everyone = [StoredFile.model_validate(file) for part in listed for file in part]
            problem = self._agree(problem)
            if problem is None:
                marker = self._marker(step, everyone)
                problem = self._agree(self._attempt(lambda: self.catalog.complete(marker)) if main else None)
            if problem is None:
                self._note_saved(step)
                self.failures = 0
                if main:
                    self._attempt(self.catalog.prune)
        shutil.rmtree(local)
        self._tried_at = self._clock()
        return problem

    def _marker(self, step: int, files: list[StoredFile]) -> CompleteMarker:
        return CompleteMarker(
            step=step,
            world_size=self._place.world_size,
            global_batch_size=self._run.training.global_batch_size,
            micro_batch_size=self._run.batch.micro_batch_size,
            seed=self._run.training.seed,
            files=sorted(files, key=lambda file: file.path),
            created_at=datetime.now(UTC),
            **({} if self._identity is None else self._identity.to_marker(self._run)),
        )

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """Runs ``action``. Returns what the store said where it failed."""
        try:
            action()
        except StoreUnavailableError as error:
            return str(error)
        return None

    def _agree(self, problem: str | None) -> str | None:
        """The first rank's problem, on every rank. Also a barrier, and a vote on whether any was asked to stop."""
        gathered = gather_json([problem, self._stop.requested])
        self._stopping = any(stopping for _, stopping in gathered)
        return next((found for found, _ in gathered if found is not None), None)

    def _write_shared(self, trainer: "LoRATrainer", local: Path) -> list[str]:
        """Gathers the sharded state on all ranks; rank 0 writes it. Returns the names of the files that it wrote."""
        adapter = {name: full_tensor(parameter) for name, parameter in _trainable(trainer.model)}
        moments = collect_state(_inner_optimizer(trainer), _trainable(trainer.model))
        if not self._place.is_main:
            return []
        objective = trainer.objective_state()
        if objective is not None:
            save_file(objective[0], local / OBJECTIVE_STATE, metadata=objective[1])
        save_file(adapter, local / ADAPTER_STATE)
        save_file(moments, local / OPTIMIZER_STATE)
        trainer.state.save_to_json(str(local / TRAINER_STATE))
        loop = {
            "scheduler": trainer.lr_scheduler.state_dict(),
            "before": self.before.to_wire() if self.before else Evaluation(None, []).to_wire(),
            "skipped": [trainer.skipped, trainer.skipped_in_a_row],
            "resumedFrom": self.resumed_from,
        }
        (local / LOOP_STATE).write_text(json.dumps(loop))
        return [*SHARED, *([OBJECTIVE_STATE] if objective is not None else [])]

    # -- reading

    def restore(self, model: torch.nn.Module) -> Resume | None:
        """Fetches the newest complete checkpoint and loads its adapter into ``model``; ``None`` where there is none.

        Rank 0 chooses, so that all ranks go on from the same step. One with a file that is not as its COMPLETE.json
        says, or cannot be of this run, on any rank is passed over for the next older one, and no longer counts as
        complete.

        Raises:
            BadSpecError: the checkpoint is of a run with another batch size or seed.
        """
        found = self.catalog.complete_ones() if self._place.is_main else []
        choices = broadcast_json([marker.to_wire() for marker in found])
        for choice in choices:
            marker = CompleteMarker.model_validate(choice)
            self.catalog.check_same_run(marker)
            directory = self._directory / f"resume-rank-{self._place.rank}-step-{marker.step}"
            problem = self._fetch(self.catalog, marker, directory, model)
            if problem is None:
                resume = read_resume(marker.step, directory)
                self.before = resume.before
                self.resumed_from = json.loads((directory / LOOP_STATE).read_text()).get("resumedFrom")
                self._load(resume, model)
                return resume
            if self._place.is_main:
                sys.stderr.write(f"the checkpoint of step {marker.step} is damaged and is passed over: {problem}\n")
                self.catalog.condemn(marker.step)
        return None

    def find_origin(self, model: torch.nn.Module, total_steps: int) -> Resume | None:
        """Fetches the checkpoint of another run that this one begins with; ``None`` where it asks for none.

        All ranks call it, of a run that has no checkpoint of its own. Rank 0 chooses. What is loaded before
        ``adopt``, such as an evaluation, is of the base model, as it is for a run that begins at step 0.

        Raises:
            BadSpecError: there is none that is whole, or it does not fit this run of ``total_steps`` in all.
        """
        if self._run.checkpoint.resume_from is None:
            return None
        tried: list[str] = []
        while choices := broadcast_json(self._list_origins(total_steps, tried)):
            for choice in choices:
                marker = CompleteMarker.model_validate(choice["marker"])
                origin = Origin(Folder(Store(choice["store"], self._store.retry_seconds), choice["prefix"]), marker)
                if choice["misfit"]:
                    raise BadSpecError(choice["misfit"])
                directory = self._directory / f"origin-{len(tried)}-rank-{self._place.rank}-step-{marker.step}"
                problem = self._fetch(origin.folder, marker, directory, model)
                if problem is None:
                    warning = f"\nwarning: {choice['warning']}" if choice["warning"] else ""
                    self._progress.note(f"{describe_start(origin)}{warning}")
                    self._origin, self.resumed_from = directory, origin.url
                    return read_resume(marker.step, directory)
                tried.append(origin.url)
                if self._place.is_main:
                    sys.stderr.write(f"{origin.url} is damaged and is passed over: {problem}\n")
        raise BadSpecError(describe_nothing(self._run, self._store, len(tried)))

    def _list_origins(self, total_steps: int, tried: Container[str]) -> list[dict[str, Any]]:
        """What the run may begin with, the best first, but for what was ``tried``. On rank 0, else nothing.

        It is asked again once all are tried: of a run that is alive a newer one may have pushed them out meanwhile.
        """
        if not self._place.is_main or self._identity is None:
            return []
        return [
            {
                "store": origin.folder.store.uri,
                "prefix": origin.folder.prefix,
                "marker": origin.marker.to_wire(),
                "misfit": find_misfit(self._run, origin, self._identity.base, total_steps),
                "warning": find_other_data(origin, self._identity.data),
            }
            for origin in find_origins(self._run, self._store)
            if origin.url not in tried
        ]

    def adopt(self, origin: Resume, model: torch.nn.Module) -> None:
        """Loads what ``find_origin`` fetched: from now on it is as if this run had saved it."""
        take_logging_steps(origin.directory, self._run.training.logging_steps)
        self._load(origin, model)

    def _fetch(self, folder: Folder, marker: CompleteMarker, directory: Path, model: torch.nn.Module) -> str | None:
        """Fetches a checkpoint to ``directory``. Returns what is wrong with it, the same on all ranks."""
        shapes = {name: tuple(parameter.shape) for name, parameter in _trainable(model)}
        names = [*SHARED, OBJECTIVE_STATE, rng_file(self._place.rank)]
        problem = folder.fetch(marker, names, directory)
        problem = problem or find_damage(directory, ADAPTER_STATE, shapes, SHARED)
        return self._agree(problem or find_odd_state(directory, marker.step))

    def _load(self, resume: Resume, model: torch.nn.Module) -> None:
        saved = load_file(resume.directory / ADAPTER_STATE)
        for name, parameter in _trainable(model):
            if name not in saved:
                raise InternalError(f"checkpoint of step {resume.step}: {name} is missing")
            assign_full(parameter, saved[name])
        self._note_saved(resume.step)

    def load_optimizer(self, trainer: "LoRATrainer", directory: Path) -> None:
        """Puts the moments and the schedule back."""
        optimizer = _inner_optimizer(trainer)
        restore_state(optimizer, _trainable(trainer.model), load_file(directory / OPTIMIZER_STATE))
        loop = json.loads((directory / LOOP_STATE).read_text())
        trainer.skipped, trainer.skipped_in_a_row = loop["skipped"]
        if directory == self._origin:  # its own rates hold, as long as they are the same the bits are too
            place_schedule(trainer.lr_scheduler, loop["scheduler"])
        else:
            trainer.lr_scheduler.load_state_dict(loop["scheduler"])
        for group, rate in zip(optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # the scheduler itself sets it only at its next step

    def load_rng(self, directory: Path) -> None:
        """Puts the random states of this rank back. With another number of processes there may be none: seeds stay."""
        path = directory / rng_file(self._place.rank)
        if path.exists():
            restore_rng_state(json.loads(path.read_text()))


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _inner_optimizer(trainer: "LoRATrainer") -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return optimizer

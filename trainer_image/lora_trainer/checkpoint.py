"""Checkpoints in the store: STORE/NAMESPACE/NAME/checkpoints/UID/step-N/, COMPLETE.json last.

A checkpoint holds what the losses after it depend on: the adapter, the optimizer's two moments, the learning rate's
schedule, the random states of every rank and the trainer's own state (step, history). Tensors are whole, not sharded,
so that a run can go on with another number of processes; only the random states of dropout are lost by that. No file
is a pickle. One without COMPLETE.json, or with a file that is not as COMPLETE.json says, does not exist.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

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
from lora_trainer.errors import BadSpecError, InternalError
from lora_trainer.evaluate import Evaluation
from lora_trainer.parallel import any_rank, assign_full, full_tensor
from lora_trainer.progress import Progress
from lora_trainer.rng import read_rng_state, restore_rng_state
from lora_trainer.settings import Place
from lora_trainer.store import ObjectNotFoundError, Store, describe_file, file_digest, join

if TYPE_CHECKING:
    from lora_trainer.trainer import LoRATrainer

ADAPTER_STATE = "adapter.safetensors"
OPTIMIZER_STATE = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"
LOOP_STATE = "loop.json"
OBJECTIVE_STATE = "objective.safetensors"
"""What an objective needs again and can no longer compute. Only where there is any."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def rng_file(rank: int) -> str:
    """Name of the file with the random states of ``rank``."""
    return f"rng-{rank}.json"


@dataclass(frozen=True)
class Resume:
    """A checkpoint that was fetched: its step, its files, and the evaluation before training."""

    step: int
    directory: Path
    before: Evaluation


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, store: Store, run: RunSpec, place: Place, directory: Path, progress: Progress) -> None:
        root = adapter_prefix(run.namespace, run.adapter_name)
        self.prefix = join(root, checkpoints_directory(run.uid))
        self.before: Evaluation | None = None
        self._store, self._run, self._place, self._progress = store, run, place, progress
        self._root, self._directory = root, directory
        self._last_step: int | None = None

    # -- writing

    def check_writable(self) -> None:
        """Writes and deletes a small object, so that credentials that may only read end the run before training."""
        if self._place.is_main:
            path = join(self.prefix, "probe")
            try:
                self._store.put(path, b"probe")
            except ObjectNotFoundError as error:
                raise BadSpecError(f"publish.store: {self._run.publish.store}: there is no such bucket") from error
            self._store.delete([path])

    def save(self, trainer: "LoRATrainer") -> None:
        """Saves the state after the current step. All ranks call it; it returns when the checkpoint is complete."""
        step = int(trainer.state.global_step)
        if step == self._last_step:
            return
        self._progress.stage("checkpointing")
        local = self._directory / f"step-{step}-rank-{self._place.rank}"
        local.mkdir(parents=True, exist_ok=True)
        names = self._write_shared(trainer, local)
        (local / rng_file(self._place.rank)).write_text(json.dumps(read_rng_state()))
        if not self._place.is_main:
            names = []
        target = join(self._root, checkpoint_directory(self._run.uid, step))
        files = []
        for name in [*names, rng_file(self._place.rank)]:
            self._store.upload(local / name, join(target, name))
            files.append(describe_file(local / name, name))
            (local / name).unlink()
        everyone = _gather_lists(files, self._place)
        if self._place.is_main:
            self._complete(step, target, everyone)
        any_rank(False, trainer.args.device)  # noqa: FBT003 - a barrier: nobody goes on before it is complete
        self._last_step = step
        self._progress.stage("training")

    def _write_shared(self, trainer: "LoRATrainer", local: Path) -> list[str]:
        """Gathers the sharded state on all ranks; rank 0 writes it. Returns the names of the files."""
        adapter, moments = {}, {}
        optimizer = _inner_optimizer(trainer)
        for name, parameter in _trainable(trainer.model):
            adapter[name] = full_tensor(parameter)
            state = optimizer.state[parameter]
            moments[f"{name}.step"] = torch.as_tensor(state["step"], dtype=torch.float32).detach().cpu().clone()
            for moment in MOMENTS:
                moments[f"{name}.{moment}"] = full_tensor(state[moment])
        names = [ADAPTER_STATE, OPTIMIZER_STATE, TRAINER_STATE, LOOP_STATE]
        objective = trainer.objective_state()
        if objective is not None:
            names.append(OBJECTIVE_STATE)
        if self._place.is_main:
            if objective is not None:
                save_file(objective[0], local / OBJECTIVE_STATE, metadata=objective[1])
            save_file(adapter, local / ADAPTER_STATE)
            save_file(moments, local / OPTIMIZER_STATE)
            trainer.state.save_to_json(str(local / TRAINER_STATE))
            loop = {
                "scheduler": trainer.lr_scheduler.state_dict(),
                "before": self.before.to_wire() if self.before else Evaluation(None, []).to_wire(),
            }
            (local / LOOP_STATE).write_text(json.dumps(loop))
        return names

    def _complete(self, step: int, target: str, files: list[StoredFile]) -> None:
        marker = CompleteMarker(
            step=step,
            world_size=self._place.world_size,
            global_batch_size=self._run.training.global_batch_size,
            micro_batch_size=self._run.batch.micro_batch_size,
            files=sorted(files, key=lambda file: file.path),
            created_at=datetime.now(UTC),
        )
        self._store.put(join(target, COMPLETE_FILE), json.dumps(marker.to_wire(), indent=1).encode())
        self.prune()

    def prune(self) -> None:
        """Deletes all but the newest ``checkpoint.keep`` complete checkpoints, and incomplete ones older than those.

        The marker goes first, so that what is half deleted no longer counts.
        """
        by_step = _group_by_step(self._store.sizes(self.prefix))
        complete = sorted(step for step, paths in by_step.items() if _marker_path(paths))
        kept = complete[-self._run.checkpoint.keep :]
        for step, paths in by_step.items():
            if kept and step < kept[-1] and step not in kept:
                self._store.delete(sorted(paths, key=lambda path: not path.endswith(COMPLETE_FILE)))

    def delete_all(self) -> None:
        """Deletes every checkpoint of the run, newest last, so that a cut leaves the newest."""
        for _, paths in sorted(_group_by_step(self._store.sizes(self.prefix)).items()):
            self._store.delete(sorted(paths, key=lambda path: not path.endswith(COMPLETE_FILE)))

    # -- reading

    def restore(self, model: torch.nn.Module) -> Resume | None:
        """Fetches the newest complete checkpoint and loads its adapter into ``model``; ``None`` where there is none.

        Rank 0 chooses, so that all ranks go on from the same step.
        """
        marker = self.find() if self._place.is_main else None
        marker = _broadcast(marker, self._place)
        if marker is None:
            return None
        directory = self._directory / f"resume-rank-{self._place.rank}"
        mine = {ADAPTER_STATE, OPTIMIZER_STATE, TRAINER_STATE, LOOP_STATE, OBJECTIVE_STATE, rng_file(self._place.rank)}
        self._fetch(marker, directory, mine)
        loop = json.loads((directory / LOOP_STATE).read_text())
        saved = load_file(directory / ADAPTER_STATE)
        for name, parameter in _trainable(model):
            if name not in saved:
                raise InternalError(f"checkpoint of step {marker.step}: {name} is missing")
            assign_full(parameter, saved[name])
        self.before = Evaluation.from_wire(loop["before"])
        self._last_step = marker.step
        return Resume(marker.step, directory, self.before)

    def find(self) -> CompleteMarker | None:
        """Marker of the newest complete checkpoint. One whose files are not all there, in full size, is passed over."""
        sizes = self._store.sizes(self.prefix)
        for _, paths in sorted(_group_by_step(sizes).items(), reverse=True):
            path = _marker_path(paths)
            if path is None:
                continue
            try:
                marker = CompleteMarker.model_validate_json(self._store.get(path))
            except (ValidationError, ObjectNotFoundError):
                continue
            directory = path.removesuffix(COMPLETE_FILE)
            if all(sizes.get(directory + file.path) == file.size for file in marker.files):
                return marker
        return None

    def _fetch(self, marker: CompleteMarker, directory: Path, wanted: Iterable[str]) -> None:
        source = join(self._root, checkpoint_directory(self._run.uid, marker.step))
        for file in marker.files:
            if file.path in wanted:
                target = directory / file.path
                self._store.download(join(source, file.path), target, file.size)
                if file_digest(target) != file.sha256:
                    raise InternalError(f"{self._store.url(source)}/{file.path}: its SHA-256 is not as it was written")

    def load_optimizer(self, trainer: "LoRATrainer", directory: Path) -> None:
        """Puts the moments and the schedule back."""
        saved = load_file(directory / OPTIMIZER_STATE)
        optimizer = _inner_optimizer(trainer)
        fused = bool(optimizer.defaults.get("fused"))
        for name, parameter in _trainable(trainer.model):
            state: dict[str, Any] = {}
            state["step"] = saved[f"{name}.step"].to(parameter.device if fused else "cpu")
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, requires_grad=False)
                assign_full(state[moment], saved[f"{name}.{moment}"])
            optimizer.state[parameter] = state
        loop = json.loads((directory / LOOP_STATE).read_text())
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


def _group_by_step(paths: Iterable[str]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for path in paths:
        step = parse_checkpoint_step(path)
        if step is not None:
            groups.setdefault(step, []).append(path)
    return groups


def _marker_path(paths: Iterable[str]) -> str | None:
    return next((path for path in paths if path.endswith("/" + COMPLETE_FILE)), None)


def _gather_lists(files: list[StoredFile], place: Place) -> list[StoredFile]:
    if place.world_size == 1:
        return files
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, files)
    return [file for part in gathered for file in part]


def _broadcast(marker: CompleteMarker | None, place: Place) -> CompleteMarker | None:
    if place.world_size == 1:
        return marker
    box: list[Any] = [marker]
    dist.broadcast_object_list(box, src=0)
    found: CompleteMarker | None = box[0]
    return found

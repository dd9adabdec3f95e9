"""Brings the base model and the dataset to the local disk, once for each pod."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from lora_api.run import PVC_ROOT, RunSpec
from lora_api.sources import BaseModelSource, DataSource
from lora_trainer import hub
from lora_trainer.errors import ModelNotFoundError
from lora_trainer.settings import Place
from lora_trainer.store import ObjectNotFoundError, Store, split_uri

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Files of a model that are used: weights, configuration, tokenizer, chat template. Never pickled weights."""

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

FETCHED_FILE = "fetched.json"


@dataclass(frozen=True)
class Sources:
    """Local paths of what the run reads. Data files are in the order in which they are read."""

    model: Path
    train: list[Path]
    eval: list[Path] | None

    def to_json(self) -> str:
        """For the other processes of the pod."""
        return json.dumps(
            {
                "model": str(self.model),
                "train": [str(path) for path in self.train],
                "eval": None if self.eval is None else [str(path) for path in self.eval],
            }
        )

    @staticmethod
    def from_json(text: str) -> "Sources":
        """The inverse of ``to_json``."""
        value = json.loads(text)
        return Sources(
            Path(value["model"]),
            [Path(path) for path in value["train"]],
            None if value["eval"] is None else [Path(path) for path in value["eval"]],
        )


def fetch_sources(run: RunSpec, place: Place, directory: Path) -> Sources:
    """Fetches model and data of ``run`` into ``directory``. One process of the pod does it, the others wait for it.

    Raises:
        ModelNotFoundError: something is not there.
        AuthDeniedError: the credentials were refused.
        StoreUnavailableError: the store or the model hub kept failing.
        OSError: the disk is full.
    """
    marker = directory / FETCHED_FILE
    if not place.is_local_main:
        while not marker.exists():  # bounded by the launcher, which ends this process when the fetching one fails
            time.sleep(0.1)
        return Sources.from_json(marker.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    sources = Sources(
        fetch_model(run.base_model, directory / "model"),
        fetch_data(run.dataset.train, directory / "train"),
        fetch_data(run.dataset.eval, directory / "eval") if run.dataset.eval else None,
    )
    part = marker.with_suffix(".part")
    part.write_text(sources.to_json())
    part.replace(marker)
    return sources


def local_path(uri: str) -> Path | None:
    """Where ``uri`` is mounted (file://, pvc://), or ``None`` where it has to be fetched."""
    scheme, rest = split_uri(uri)
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    if scheme == "pvc":
        return Path(PVC_ROOT) / rest.strip("/")
    return None


def fetch_model(source: BaseModelSource, target: Path) -> Path:
    """Directory of the model: ``target``, or where it is mounted or cached.

    Raises:
        ModelNotFoundError: it is not there, or a part of it is missing.
    """
    scheme, rest = split_uri(source.uri)
    directory = local_path(source.uri)
    if directory is None:
        directory = target
        if scheme == "hf":
            directory = hub.fetch_snapshot(rest, source.revision, [f"*{suffix}" for suffix in MODEL_SUFFIXES])
        else:
            Store(source.uri).download_directory("", target, lambda name: name.endswith(MODEL_SUFFIXES))
    missing = [
        what for what, pattern in (("config.json", "config.json"), ("*.safetensors", "*.safetensors"))
        if not any(directory.glob(pattern))
    ]  # fmt: skip
    if missing:
        raise ModelNotFoundError(
            f"{source.uri}: no {' and no '.join(missing)} there. A model is a directory in Hugging Face layout; "
            "weights in pickle files (*.bin, *.pt) are not read."
        )
    return directory


def fetch_data(source: DataSource, target: Path) -> list[Path]:
    """Files of a dataset, in the order of their names.

    Raises:
        ModelNotFoundError: there is none.
    """
    scheme, rest = split_uri(source.uri)
    mounted = local_path(source.uri)
    if mounted is not None:
        files = _data_files(mounted)
    elif scheme == "hf":
        split = source.split or "train"
        files = [target / f"{split}.parquet"]
        hub.fetch_split(rest, source.revision, split, files[0])
    else:
        files = _fetch_data_objects(source.uri, target)
    if not files:
        raise ModelNotFoundError(f"{source.uri}: no {', '.join(DATA_SUFFIXES)} file there")
    return files


def _data_files(path: Path) -> list[Path]:
    """Files to read at ``path``. Beside records in another form, a .json file describes them and is not read."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(DATA_SUFFIXES) and file.is_file())
    return [file for file in files if file.suffix != ".json"] or files


def _fetch_data_objects(uri: str, target: Path) -> list[Path]:
    if uri.endswith(DATA_SUFFIXES):
        parent, _, name = uri.rpartition("/")
        try:
            Store(parent).download(name, target / name)
        except ObjectNotFoundError as error:
            raise ModelNotFoundError(f"{uri}: there is no such object or bucket") from error
        return [target / name]
    Store(uri).download_directory("", target, lambda name: name.endswith(DATA_SUFFIXES))
    return _data_files(target)

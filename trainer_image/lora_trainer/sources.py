"""Brings the base model and the dataset to the local disk, once for each pod."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_api.run import PVC_ROOT, RunSpec
from lora_api.sources import BaseModelSource, DataSource
from lora_trainer import hub
from lora_trainer.errors import BadDataError, BadSpecError, ModelNotFoundError
from lora_trainer.headers import INDEX_FILE, SINGLE_FILE, read_weight_map
from lora_trainer.inside import find_problem, find_way_out
from lora_trainer.settings import Place
from lora_trainer.store import ObjectNotFoundError, Store, is_plain_name, split_uri

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Files of a model that are used: weights, configuration, tokenizer, chat template. Never pickled weights."""

WEIGHTS = ".safetensors"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")

SPLITS_FILE, TABLE_FILE = "dataset_dict.json", "state.json"
"""What datasets' save_to_disk writes beside the data: the names of the splits, and the names of one table's files."""

FETCHED_FILE = "fetched.json"

MAX_DESCRIPTION = 64 * 1024 * 1024
"""Bytes of the largest file that is read whole for what it says of others: an index, a configuration."""

MAX_SMALL_FILE = 512 * 1024 * 1024
"""Bytes of the largest file of a model beside its weights. Tokenizers, the largest of them, have some tens of MiB."""


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
    find_model_files(source.uri, directory)
    check_weight_names(source.uri, directory)
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


def find_model_files(uri: str, directory: Path) -> list[Path]:
    """The files of the model in ``directory``, by name.

    Raises:
        ModelNotFoundError: one leads out of its claim, is no file, or is too large for what it is.
    """
    problem = find_way_out(directory) if directory.exists() else None
    if problem is not None:
        raise ModelNotFoundError(f"{uri}: {problem}")
    found = []
    for file in sorted(directory.glob("*")):
        if not file.name.endswith(MODEL_SUFFIXES) or _is_directory(file):
            continue
        problem = find_problem(file)
        if problem is None and not file.name.endswith(WEIGHTS) and file.stat().st_size > MAX_SMALL_FILE:
            problem = f"has {file.stat().st_size} bytes, and a file beside the weights may have {MAX_SMALL_FILE}"
        if problem is not None:
            raise ModelNotFoundError(f"{uri}: {file.name}: {problem}")
        found.append(file)
    return found


def check_weight_names(uri: str, directory: Path) -> None:
    """Checks that the index of the weights names files of this directory: transformers opens whatever it names.

    Raises:
        ModelNotFoundError: it names something else.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).exists() or not index.exists():
        return
    for name in read_weight_map(read_description(uri, index)).values():
        if not is_plain_name(name):
            raise ModelNotFoundError(f"{uri}: {INDEX_FILE}: {name[:200]!r} is not the name of a file beside it")


def read_description(uri: str, file: Path) -> Any:
    """The JSON document in ``file``.

    Raises:
        ModelNotFoundError: it is none, or has more than MAX_DESCRIPTION bytes.
    """
    size = file.stat().st_size
    if size > MAX_DESCRIPTION:
        raise ModelNotFoundError(f"{uri}: {file.name}: has {size} bytes, and may have {MAX_DESCRIPTION}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{uri}: {file.name}: is not JSON: {error}") from error


def fetch_data(source: DataSource, target: Path) -> list[Path]:
    """Files of a dataset, in the order of their names.

    Raises:
        ModelNotFoundError: there is none, or not the split.
        BadSpecError: a split of what has none.
        BadDataError: a saved dataset whose description cannot be read.
    """
    scheme, rest = split_uri(source.uri)
    mounted = local_path(source.uri)
    if mounted is not None:
        files = _data_files(mounted, source)
    elif scheme == "hf":
        split = source.split or "train"
        files = [target / f"{split}.parquet"]
        hub.fetch_split(rest, source.revision, split, files[0])
    else:
        files = _fetch_data_objects(source, target)
    if not files:
        raise ModelNotFoundError(f"{source.uri}: no {', '.join(DATA_SUFFIXES)} file there")
    return files


def _data_files(path: Path, source: DataSource) -> list[Path]:
    """Files to read at ``path``. Beside records in another form, a .json file describes them and is not read."""
    problem = find_way_out(path) if path.exists() or path.is_symlink() else None
    if problem is not None:
        raise BadDataError(f"{source.uri}: {problem}")
    if (path / SPLITS_FILE).is_file():
        return _saved_table(path / _check_split(_read_names(path / SPLITS_FILE, "splits"), source), source)
    if source.split is not None and split_uri(source.uri)[0] != "hf":
        raise BadSpecError(f"dataset: split {source.split}: {source.uri} has no splits; leave split out")
    if (path / TABLE_FILE).is_file() and (path / "dataset_info.json").is_file():
        return _saved_table(path, source)
    if path.exists() and not path.is_dir():
        return [_checked(path)]
    named = sorted(file for file in path.rglob("*") if file.name.endswith(DATA_SUFFIXES) and not _is_directory(file))
    files = [_checked(file) for file in named]
    return [file for file in files if file.suffix != ".json"] or files


def _is_directory(path: Path) -> bool:
    """Whether ``path`` is a directory. A link in circles is none, and is refused later."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _checked(file: Path) -> Path:
    problem = find_problem(file)
    if problem is not None:
        raise BadDataError(f"{file.name}: {problem}")
    return file


def _saved_table(directory: Path, source: DataSource) -> list[Path]:
    """The files of one table that datasets saved, in its order."""
    files = [directory / Path(name).name for name in _read_names(directory / TABLE_FILE, "_data_files")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelNotFoundError(f"{source.uri}: {', '.join(missing)} is missing, which its {TABLE_FILE} names")
    return [_checked(file) for file in files]


def _check_split(splits: list[str], source: DataSource) -> str:
    split = source.split or "train"
    if split not in splits or Path(split).name != split:
        raise ModelNotFoundError(f"{source.uri}: there is no split {split}; it has {', '.join(splits) or 'none'}")
    return split


def _read_names(file: Path, field: str) -> list[str]:
    try:
        if file.stat().st_size > MAX_DESCRIPTION:
            raise BadDataError(f"{file.name}: has more than {MAX_DESCRIPTION} bytes")
        listed = json.loads(_checked(file).read_bytes())[field]
        return [str(entry["filename"] if isinstance(entry, dict) else entry) for entry in listed]
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{file.name} is missing in {file.parent.name}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadDataError(f"{file.name}: is not as datasets' save_to_disk writes it: {error}") from error


def _fetch_data_objects(source: DataSource, target: Path) -> list[Path]:
    if source.uri.endswith(DATA_SUFFIXES):
        parent, _, name = source.uri.rpartition("/")
        try:
            Store(parent).download(name, target / name)
        except ObjectNotFoundError as error:
            raise ModelNotFoundError(f"{source.uri}: there is no such object or bucket") from error
        return _data_files(target / name, source)
    store = Store(source.uri)
    names = store.sizes()
    inside = f"{source.split or 'train'}/" if SPLITS_FILE in names else ""
    store.download_directory(
        "", target, lambda name: name.endswith(DATA_SUFFIXES) and (name.startswith(inside) or name == SPLITS_FILE)
    )
    return _data_files(target, source)

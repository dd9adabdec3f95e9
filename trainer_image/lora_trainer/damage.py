"""Whether the files of a checkpoint can be what was saved, before they are loaded. Imports no torch.

A digest tells damage by accident; who can write to the store writes file and digest. What is loaded after this has the
tensors of this run's adapter and a size that such a state can have.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_trainer.errors import ModelNotFoundError
from lora_trainer.headers import LENGTH_BYTES, Header, header_length, parse_header

MAX_JSON = 256 * 1024 * 1024
"""Bytes of a file of the trainer's own state: its history has some hundred bytes for each step that was logged."""

SPARE = 1024 * 1024 * 1024
BYTES_A_WEIGHT = 64
"""Bytes that a file of tensors may have for each weight of the adapter: an optimizer's moments are 8 of them. What an
objective keeps depends on the number of its records, and is ``SPARE``."""

MAX_PROBLEM = 1000
"""Characters of what is wrong. It goes to every rank, and may repeat a name of a million characters."""

Shapes = Mapping[str, tuple[int, ...]]


def find_damage(directory: Path, adapter: str, shapes: Shapes, needed: Iterable[str] = ()) -> str | None:
    """What is wrong with the files in ``directory``, one of which is ``adapter`` and has tensors of ``shapes``.

    All that are ``needed`` have to be there.
    """
    problem = _find_damage(directory, adapter, shapes, needed)
    return None if problem is None else problem[:MAX_PROBLEM]


def _find_damage(directory: Path, adapter: str, shapes: Shapes, needed: Iterable[str]) -> str | None:
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        return f"{', '.join(missing)}: missing"
    weights = sum(map(math.prod, shapes.values()))
    try:
        for file in sorted(directory.iterdir()):
            size = file.stat().st_size
            if file.suffix == ".json":
                _check_json(file, size)
                continue
            if size > BYTES_A_WEIGHT * weights + SPARE:
                return f"{file.name}: has {size} bytes, and the adapter {weights} weights"
            header = read_file_header(file)
            if file.name == adapter:
                _check_shapes(file.name, header, shapes)
    except (ModelNotFoundError, ValueError, RecursionError) as error:
        return str(error)
    return None


def read_file_header(file: Path) -> Header:
    """The tensors of a safetensors file.

    Raises:
        ModelNotFoundError: it is none.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        length = header_length(content.read(LENGTH_BYTES), file.name, size)
        return parse_header(content.read(length), file.name, size)


def _check_json(file: Path, size: int) -> None:
    if size > MAX_JSON:
        raise ValueError(f"{file.name}: has {size} bytes, and may have {MAX_JSON}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: is no JSON object")  # noqa: TRY004 - as all that is wrong with a file


def _check_shapes(name: str, header: Header, shapes: Shapes) -> None:
    if odd := _first(header.keys() ^ shapes.keys()):
        raise ValueError(f"{name}: {odd} is {'not of this run' if odd in header else 'missing'}")
    for key, tensor in header.items():
        if tensor.shape != shapes[key]:
            raise ValueError(f"{name}: {key}: has the shape {list(tensor.shape)}, and this run's {list(shapes[key])}")


def _first(names: Iterable[str]) -> str:
    return min(names, default="")

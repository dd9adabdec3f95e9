"""Headers of safetensors files: which tensors there are, of which type and shape, without any of their values.

The format (github.com/huggingface/safetensors, README, "Format"): 8 bytes, the length N of the header, unsigned and
little-endian; N bytes of JSON, {name: {dtype, shape, data_offsets}}; then the values. Pure.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_trainer.errors import ModelNotFoundError
from lora_trainer.modelshape import ModelShape, Weights

LENGTH_BYTES = 8
MAX_FORMAT_HEADER = 100_000_000
"""Bytes of the longest header that the format allows."""

MAX_HEADER = 16 * 1024 * 1024
"""Bytes of the longest header that is read: one of 100,000 tensors. Longer ones take gigabytes of memory."""

MAX_DIMENSIONS = 16
MAX_SIZE = 2**48
"""More values than a dimension of a tensor, and more bytes than a file, has."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

MAX_SHOWN = 200
"""Characters of a tensor's name, or of what is wrong with a header, that a message repeats."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "BOOL": 1}
_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
"""Of other types, such as F4, several may share a byte; they come with newer versions of the format."""

_DTYPE = re.compile(r"[A-Za-z0-9_]{1,32}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its type as safetensors calls it, such as BF16, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)


Header = dict[str, TensorInfo]


def header_length(start: bytes, name: str, size: int) -> int:
    """Length of the header, from the first 8 bytes of the file ``name`` of ``size`` bytes.

    Raises:
        ModelNotFoundError: it is no safetensors file, or one that was cut.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or length > MAX_FORMAT_HEADER:
        raise ModelNotFoundError(f"{name}: is no safetensors file")
    if LENGTH_BYTES + length > size:
        raise ModelNotFoundError(f"{name}: was cut: it has {size} bytes, and its header alone takes more")
    if length > MAX_HEADER:
        raise ModelNotFoundError(
            f"{name}: has a header of {length} bytes, and at most {MAX_HEADER} are read; save the model in more files"
        )
    return length


def parse_header(text: bytes, name: str, size: int) -> Header:
    """The tensors of the file ``name`` of ``size`` bytes, by name. ``text`` is its header.

    Raises:
        ModelNotFoundError: the header is broken, or values that it promises are not in the file.
    """
    try:
        decoded = text.decode()  # bytes, json would take for UTF-16 too
        entries = json.loads(decoded, object_pairs_hook=_refuse_twins, parse_constant=_refuse_constant)
        _check_metadata(entries.pop("__metadata__", None))
        "".join(entries).encode()  # "\\ud800" is a character in JSON alone
        header = {
            key: TensorInfo(_read_dtype(value["dtype"]), _read_shape(value["shape"])) for key, value in entries.items()
        }
        spans = {key: _read_span(value["data_offsets"]) for key, value in entries.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelNotFoundError(f"{name}: its safetensors header is broken: {str(error)[:MAX_SHOWN]}") from error
    for key, tensor in header.items():
        start, end = spans[key]
        if tensor.dtype in _BYTES and end - start != tensor.weights * _BYTES[tensor.dtype]:
            what = f"{end - start} bytes are not {tensor.dtype} {list(tensor.shape)}"
            raise ModelNotFoundError(f"{name}: {key[:MAX_SHOWN]}: {what}")
    last = 0
    for key, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != last:
            where = "overlap those of another tensor" if start < last else "do not follow those of another tensor"
            raise ModelNotFoundError(f"{name}: {key[:MAX_SHOWN]}: its bytes {start} to {end} {where}")
        last = end
    promised = LENGTH_BYTES + len(text) + last
    if promised != size:
        raise ModelNotFoundError(f"{name}: has {size} bytes, and its header describes {promised}; upload it again")
    return header


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may choose differently between two entries of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has two entries of one name")
    return found


def _refuse_constant(word: str) -> None:
    """NaN and Infinity, which Python's JSON has and no other."""
    raise ValueError(f"{word} is no number")


def _check_metadata(value: object) -> None:
    if value is not None and not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        raise ValueError("__metadata__ is no object of strings")


def _read_dtype(value: object) -> str:
    if not isinstance(value, str) or not _DTYPE.fullmatch(value):
        raise ValueError(f"{str(value)[:80]} is no type")
    return value


def _read_shape(value: list[Any]) -> tuple[int, ...]:
    if len(value) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in value):
        raise ValueError(f"{str(value)[:80]} is no shape")
    return tuple(value)


def _read_span(value: list[Any]) -> tuple[int, int]:
    start, end = value
    if not (type(start) is int and type(end) is int and 0 <= start <= end <= MAX_SIZE):
        raise ValueError(f"data_offsets {str(value)[:80]} are not where a tensor begins and ends")
    return start, end


def choose_shards(index: object, present: Iterable[str]) -> list[str]:
    """The files that hold the weights, as transformers chooses them: one file, else those of the index.

    ``index`` is the content of ``model.safetensors.index.json``, or ``None`` without one.

    Raises:
        ModelNotFoundError: there is neither, or the index is broken or names files that are not there.
    """
    names = set(present)
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if index is None:
        raise ModelNotFoundError(f"there is neither {SINGLE_FILE} nor {INDEX_FILE}")
    shards = sorted(set(read_weight_map(index).values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelNotFoundError(f"{INDEX_FILE} names {len(shards)} files, and {len(missing)} are not there: {shown}")
    return shards


def check_index(index: object, headers: Mapping[str, Header]) -> None:
    """Checks that each file has the tensors that the index says.

    Raises:
        ModelNotFoundError: some are missing.
    """
    missing = [key for key, shard in read_weight_map(index).items() if key not in headers.get(shard, {})]
    if missing:
        raise ModelNotFoundError(f"{INDEX_FILE}: {len(missing)} tensors are not in their files, such as {missing[0]}")


def read_weight_map(index: object) -> dict[str, str]:
    """The file of each tensor, from the content of ``model.safetensors.index.json``.

    Raises:
        ModelNotFoundError: it has none.
    """
    found = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, str) for value in found.values()):
        raise ModelNotFoundError(f"{INDEX_FILE}: weight_map must be an object that names a file for each tensor")
    return dict(found)


def merge(headers: Mapping[str, Header]) -> Header:
    """The tensors of all files."""
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def count_by_type(tensors: Header) -> dict[str, int]:
    """Values of each type, the most first."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.weights
    return dict(counts.most_common())


def count_weights(tensors: Header, shape: ModelShape) -> Weights:
    """The weights that are loaded: those of linear layers inside transformer layers, of experts there, and the rest.

    An output head that is tied to the embedding may be stored too; it is loaded once.
    """
    endings = tuple(f".{linear.name}.weight" for linear in shape.linears)
    linear = rest = experts = 0
    for name, tensor in tensors.items():
        if shape.tied and name.endswith("lm_head.weight"):
            continue
        if ".layers." in name and name.endswith(endings):
            linear += tensor.weights
        elif ".layers." in name and ".experts." in name and shape.is_mixture:
            experts += tensor.weights
        else:
            rest += tensor.weights
    return Weights(linear, rest, experts)

"""Reading what another version of this software wrote: what is not known is kept or left out, and never an error.

Two ways, for two kinds of documents. A record (``RecordModel``: statuses, messages, files in the store) keeps what it
does not know, so that it is still there when the record is written back. A document that is only acted upon (a
specification, a run document) is read without the fields that nobody here knows, and the reader is told of them. A
value that cannot be understood stays an error: who reads it decides, and must not act as if it were not there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, from_json

MAX_WORD = 64
"""Longest word of an open enum."""

_WORD = re.compile(rf"[A-Za-z][A-Za-z0-9]{{0,{MAX_WORD - 1}}}")

M = TypeVar("M", bound=BaseModel)
Path = tuple[int | str, ...]


class OpenEnum(StrEnum):
    """Words of which later versions may have more.

    One that is not known is a member of its own, for this occasion: it equals its text, is written back as it was, and
    ``known`` is false.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or not _WORD.fullmatch(value):
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member

    @property
    def known(self) -> bool:
        """Whether this version knows the word."""
        return self._value_ in type(self)._value2member_map_

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Any word: a schema that lists the words of one version refuses those of the next."""
        return {"type": "string", "maxLength": MAX_WORD}


@dataclass(frozen=True)
class Reading(Generic[M]):
    """A document as far as it is understood, and the paths of the fields that were left out, as they are in YAML."""

    value: M
    left_out: tuple[str, ...] = ()


def read(model: type[M], document: Mapping[str, Any]) -> Reading[M]:
    """``document`` as a ``model``, without the fields that the model does not know.

    Raises:
        pydantic.ValidationError: something else is wrong with it; unknown fields are not among its errors.
    """
    left_out: list[str] = []
    while True:
        try:
            return Reading(model.model_validate(document), tuple(left_out))
        except ValidationError as error:
            unknown = _unknown_fields(error)
            if not unknown:
                raise
            document = _without(document, unknown)
            left_out += [".".join(map(str, path)) for path in unknown]


def read_json(model: type[M], text: str) -> Reading[M]:
    """The same for a document that is JSON.

    Raises:
        pydantic.ValidationError: it is no JSON, or something else than unknown fields is wrong with it.
    """
    try:
        return Reading(model.model_validate_json(text))
    except ValidationError as error:
        if not _unknown_fields(error):
            raise
    return read(model, from_json(text))


def _unknown_fields(error: ValidationError) -> list[Path]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [item["loc"] for item in found if item["type"] == "extra_forbidden"]


def _without(document: Mapping[str, Any], paths: Iterable[Path]) -> dict[str, Any]:
    """A copy of ``document`` without the fields at ``paths``, each of which is there."""
    copy: dict[str, Any] = dict(document)
    for path in paths:
        node: Any = copy
        for part in path[:-1]:
            node[part] = list(node[part]) if isinstance(node[part], list) else dict(node[part])
            node = node[part]
        del node[path[-1]]
    return copy

"""What is wrong with a document, in words for the person who wrote it. All pure."""

import difflib
import functools
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError


def describe_mistakes(error: ValidationError, model: type[BaseModel], prefix: str = "", most: int = 5) -> str:
    """The first ``most`` mistakes, each with the path of its field, and the one that was meant if there is none."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    shown = [f"{prefix}{_describe(item, model)}" for item in errors[:most]]
    more = f" (and {len(errors) - most} more)" if len(errors) > most else ""
    return "; ".join(shown) + more


def _describe(item: Any, model: type[BaseModel]) -> str:
    path = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return f"{path}: {item['msg']}"
    meant = suggest_field(path, model)
    return f"{path}: there is no such field" + (f"; did you mean {meant}?" if meant else "")


def suggest_field(path: str, model: type[BaseModel]) -> str:
    """The field of ``model`` that was probably meant, or nothing: its name elsewhere, or nearly its name beside it."""
    parent, _, name = ".".join(part for part in path.split(".") if not part.isdecimal()).rpartition(".")
    known = {other: _plain(other) for other in field_paths(model)}
    same = [other for other, plain in known.items() if plain == _plain(name)]
    if same:
        return difflib.get_close_matches(path, same, n=1, cutoff=0.0)[0]
    beside = {plain: other for other, plain in known.items() if other.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(_plain(name), beside, n=1, cutoff=0.7)
    return beside[close[0]] if close else ""


def _plain(path: str) -> str:
    """The last part of a path, whatever way of writing words together it is in."""
    return path.rpartition(".")[2].replace("_", "").lower()


@functools.cache
def field_paths(model: type[BaseModel]) -> tuple[str, ...]:
    """Every field of ``model`` and of what it holds, by its path as it is written in YAML."""
    schema = model.model_json_schema()
    return tuple(_walk(schema, schema.get("$defs", {}), ""))


def _walk(schema: Any, definitions: Any, at: str) -> Iterator[str]:
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    for part in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *filter(None, [schema.get("items")])):
        yield from _walk(part, definitions, at)
    for name, below in schema.get("properties", {}).items():
        yield f"{at}{name}"
        yield from _walk(below, definitions, f"{at}{name}.")

"""What every model of the API shares: camelCase on the wire, snake_case in Python. ``reading`` has the rest."""

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic.alias_generators import to_camel


class ApiModel(BaseModel):
    """A value that a user writes.

    Unknown fields are an error, so that a typing mistake is never silently ignored. Types are strict, as they are for
    the API server: "16" is no number and 1 is no boolean.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )

    cel_rules: ClassVar[tuple["CelRule", ...]] = ()
    """Rules across fields, written into the CRD as ``x-kubernetes-validations``."""

    def to_wire(self) -> dict[str, Any]:
        """The JSON form, without fields that are unset (``None``)."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class RecordModel(ApiModel):
    """A value that our own programs write and read back.

    Fields that another version has written are kept, and are written back: server-side apply takes away what its
    manager no longer sends.
    """

    model_config = ConfigDict(extra="allow", strict=False)


def format_time(value: datetime) -> str:
    """RFC 3339 in UTC with whole seconds and Z, as metav1.Time writes it."""
    return value.strftime("%Y-%m-%dT%H:%M:%SZ")


def _to_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Time = Annotated[datetime, AfterValidator(_to_utc), PlainSerializer(format_time, return_type=str, when_used="json")]
"""A moment in UTC. One without a zone is taken to be in UTC."""


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measure = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A measured number. NaN and infinity, which JSON cannot carry, become ``None``."""

CUT_MARK = " ... "

_NO_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Colors and other orders to a terminal, and characters that nobody sees."""


def cut_middle(text: str, length: int) -> str:
    """``text`` cut to at most ``length`` characters: an error's beginning and end say the most."""
    if len(text) <= length:
        return text
    kept = length - len(CUT_MARK)
    if kept < 2:
        return text[: max(length, 0)]
    return text[: (kept + 1) // 2] + CUT_MARK + text[len(text) - kept // 2 :]


def clean_text(value: Any) -> Any:
    """``value`` without what is no text.

    Lone surrogates come from undecodable bytes and cannot be written as UTF-8. Colors and other orders to a terminal
    are not for a status, where each takes six times its room.
    """
    return _NO_TEXT.sub("", value).encode("utf-8", "replace").decode() if isinstance(value, str) else value


def measure(text: str) -> int:
    """Bytes of ``text`` as Go's JSON encoder writes it into an object, at most ``LONGEST_CHARACTER`` for each of it."""
    more = 5 * sum(map(text.count, "<>&")) + 3 * sum(map(text.count, "\u2028\u2029"))
    return len(text.encode()) + more + sum(map(text.count, '"\\\n\r\t'))


LONGEST_CHARACTER = 6
"""Bytes of ``\\u003c``."""


def fit(text: str, size: int) -> str:
    """``text`` cut in its middle to at most ``size`` bytes in the JSON of an object, and so to as many characters."""
    if len(text) * LONGEST_CHARACTER <= size:
        return text
    kept, length = cut_middle(text, size), size
    while (excess := measure(kept) - size) > 0:
        length = min(length, len(kept)) - max(1, excess // LONGEST_CHARACTER)
        kept = cut_middle(text, length)
    return kept


def _bounded(length: int) -> BeforeValidator:
    def cut(value: Any) -> Any:
        return fit(clean_text(value), length) if isinstance(value, str) else value

    return BeforeValidator(cut)


ShortMessage = Annotated[str, _bounded(1024), Field(max_length=1024)]
LongMessage = Annotated[str, _bounded(4096), Field(max_length=4096)]
"""Text from logs and errors. Longer text is cut in its middle: a status must never fail for being too wordy."""


def _close_up(expression: str) -> str:
    """CEL without spaces around its operators, but for its texts: a CRD has to be small."""
    parts = expression.split("'")
    return "'".join(
        re.sub(r" ?([=!<>]=|[|]{2}|&&|[<>?:+*/%,]) ?", r"\1", part) if n % 2 == 0 else part
        for n, part in enumerate(parts)
    )


def find_section(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, which may be absent; ``None`` for what is no section, such as a list of models."""
    found = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return found[0] if found and get_origin(annotation) is not list else None


class CelRule(BaseModel):
    """One CEL validation rule (Kubernetes 1.29: CustomResource validation rules are stable).

    ``message`` is the fixed text; ``message_expression`` computes one and wins where it evaluates.
    """

    model_config = ConfigDict(frozen=True)

    rule: str
    message: str
    message_expression: str | None = None
    field_path: str | None = None

    def to_wire(self) -> dict[str, str]:
        """The rule as an entry of ``x-kubernetes-validations``."""
        wire = {"rule": _close_up(self.rule), "message": self.message}
        if self.message_expression is not None:
            wire["messageExpression"] = _close_up(self.message_expression)
        if self.field_path is not None:
            wire["fieldPath"] = self.field_path
        return wire

"""What every model of the API shares: camelCase on the wire, snake_case in Python, nothing unknown accepted."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class ApiModel(BaseModel):
    """A value that a user writes. Unknown fields are an error, so that a typing mistake is never silently ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        ser_json_inf_nan="null",
    )

    cel_rules: ClassVar[tuple["CelRule", ...]] = ()
    """Rules across fields, written into the CRD as ``x-kubernetes-validations``."""

    def to_wire(self) -> dict[str, Any]:
        """The JSON form, without fields that are unset (``None``)."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class RecordModel(ApiModel):
    """A value that our own programs write and read back. Unknown fields are dropped, so that versions can be mixed."""

    model_config = ConfigDict(extra="ignore")


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
        wire = {"rule": self.rule, "message": self.message}
        if self.message_expression is not None:
            wire["messageExpression"] = self.message_expression
        if self.field_path is not None:
            wire["fieldPath"] = self.field_path
        return wire

"""CustomResourceDefinitions from the pydantic models.

Kubernetes wants a structural schema: no references, no unions beyond nullable, bounds in OpenAPI v3.0 form.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel

from lora_api import finetune, runtime
from lora_api._base import ApiModel, CelRule, RecordModel
from lora_api.patterns import HAVE_RULES, WORDS

Schema = dict[str, Any]

_RUN_COLUMNS: tuple[dict[str, Any], ...] = (
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Progress", "type": "string", "jsonPath": ".status.progress.summary"},
    {"name": "Loss", "type": "number", "jsonPath": ".status.progress.loss"},
    {"name": "ETA", "type": "string", "jsonPath": ".status.progress.eta"},
    {"name": "Adapter", "type": "string", "jsonPath": ".status.adapter.servedName"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Step", "type": "integer", "jsonPath": ".status.progress.step", "priority": 1},
    {"name": "Tokens/s", "type": "number", "jsonPath": ".status.progress.tokensPerSecond", "priority": 1},
    {"name": "Served loss", "type": "number", "jsonPath": ".status.adapter.served.after.loss", "priority": 1},
    {"name": "Served share", "type": "number", "jsonPath": ".status.adapter.served.after.share", "priority": 1},
    {"name": "Nodes", "type": "integer", "jsonPath": ".spec.parallelism.nodes", "priority": 1},
    {"name": "Attempt", "type": "integer", "jsonPath": ".status.attempt", "priority": 1},
    {"name": "Model", "type": "string", "jsonPath": ".spec.baseModel.uri", "priority": 1},
    {"name": "Runtime", "type": "string", "jsonPath": ".status.runtime.name", "priority": 1},
    {"name": "Reason", "type": "string", "jsonPath": ".status.reason", "priority": 1},
)

_RUNTIME_COLUMNS: tuple[dict[str, Any], ...] = (
    {"name": "GPU", "type": "string", "jsonPath": ".spec.gpu.name"},
    {"name": "Max nodes", "type": "integer", "jsonPath": ".spec.limits.maxNodes"},
    {"name": "Max GPUs", "type": "integer", "jsonPath": ".spec.limits.maxGPUs"},
    {"name": "Store", "type": "string", "jsonPath": ".spec.store"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Image", "type": "string", "jsonPath": ".spec.image", "priority": 1},
)


@dataclass(frozen=True)
class CustomResource:
    """A kind of ours: its model, and what Kubernetes has to know of it besides."""

    model: type[BaseModel]
    plural: str
    short_name: str
    scope: Literal["Namespaced", "Cluster"]
    columns: tuple[dict[str, Any], ...]
    categories: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Kind of the resource."""
        return str(self.model.model_fields["kind"].default)

    @property
    def name(self) -> str:
        """Name of its CustomResourceDefinition."""
        return f"{self.plural}.{finetune.GROUP}"


RUN = CustomResource(finetune.LoRAFineTune, finetune.PLURAL, "lft", "Namespaced", _RUN_COLUMNS, ("all",))
RUNTIME = CustomResource(runtime.ClusterLoRARuntime, runtime.PLURAL, "clr", "Cluster", _RUNTIME_COLUMNS)
RESOURCES = (RUN, RUNTIME)

_COPIED = (
    "type", "description", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minProperties",
    "maxProperties", "minimum", "maximum", "default", "format", "not",
)  # fmt: skip


def build_crd(resource: CustomResource = RUN) -> Schema:
    """The CustomResourceDefinition of ``resource``."""
    schema = _object_schema(resource.model)
    _shorten(schema)
    _leave_to_the_writer(schema["properties"].get("status", {}))
    # The API server knows these itself and takes no more of their schema than this.
    schema["properties"]["apiVersion"] = {"type": "string", "description": "Version of this schema of the resource."}
    schema["properties"]["kind"] = {"type": "string", "description": "Kind of the resource."}
    schema["properties"]["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    names = {
        "kind": resource.kind,
        "listKind": f"{resource.kind}List",
        "plural": resource.plural,
        "singular": resource.kind.lower(),
        "shortNames": [resource.short_name],
    }
    if resource.categories:
        names["categories"] = [*resource.categories]
    version = {
        "name": finetune.VERSION,
        "served": True,
        "storage": True,
        **({"subresources": {"status": {}}} if "status" in schema["properties"] else {}),
        "additionalPrinterColumns": [dict(column) for column in resource.columns],
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": resource.name},
        "spec": {
            "group": finetune.GROUP,
            "scope": resource.scope,
            "names": names,
            "versions": [version],
        },
    }


def _object_schema(model: type[BaseModel]) -> Schema:
    """Structural schema of ``model`` with its CEL rules."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    definitions: Mapping[str, Schema] = raw.get("$defs", {})
    schema = _convert(raw, definitions)
    _add_model_extras(model, schema)
    schema["description"] = _first_paragraph(model)
    return schema


def _convert(raw: Mapping[str, Any], definitions: Mapping[str, Schema]) -> Schema:
    """One JSON Schema node of pydantic as a structural schema node."""
    node = _resolve(raw, definitions)
    schema: Schema = {key: node[key] for key in _COPIED if key in node and node[key] is not None}
    if "const" in node:
        schema["enum"] = [node["const"]]
    for limit, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if limit in node:
            schema[bound] = node[limit]
            schema[limit] = True
    if schema.get("format") == "date-time":
        schema["type"] = "string"
    maximum = schema.get("maximum")
    if isinstance(maximum, float) and not maximum.is_integer():
        # Of `learningRate: 2` the API server only says that it should be at most 0: for a value without a point it
        # also cuts the bound to a whole number. This says it right, beside that.
        rule = CelRule(rule=f"self <= {maximum}", message=f"may be at most {maximum}")
        schema["x-kubernetes-validations"] = [rule.to_wire()]
    if "items" in node:
        schema["items"] = _convert(node["items"], definitions)
    if "properties" in node:
        schema["properties"] = {name: _convert(child, definitions) for name, child in node["properties"].items()}
        if node.get("required"):
            schema["required"] = sorted(node["required"])
    elif isinstance(node.get("additionalProperties"), Mapping):
        schema["additionalProperties"] = _convert(node["additionalProperties"], definitions)
    schema.update({key: value for key, value in node.items() if key.startswith("x-kubernetes-")})
    if schema.get("x-kubernetes-int-or-string"):
        for key in ("type", "pattern"):  # whose rule says all of it
            schema.pop(key, None)
    elif schema.get("x-kubernetes-preserve-unknown-fields"):
        del schema["type"]  # of a value of several types, such as a quantity
    elif schema.get("pattern") in HAVE_RULES:
        del schema["pattern"]
    elif schema.get("pattern") in WORDS:
        pattern = schema.pop("pattern")
        rule = CelRule(rule=f"self.matches(r'{pattern}')", message=WORDS[pattern])
        schema["x-kubernetes-validations"] = [rule.to_wire(), *schema.get("x-kubernetes-validations", [])]
    return schema


def _resolve(raw: Mapping[str, Any], definitions: Mapping[str, Schema]) -> Schema:
    """``raw`` with its reference or its nullable union replaced by what it stands for; outer keywords win."""
    node = dict(raw)
    if "$ref" in node:
        target = definitions[node.pop("$ref").rsplit("/", 1)[1]]
        return {**_resolve(target, definitions), **node}
    if "anyOf" in node:
        options = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        if (auto_or_number := _auto_or_number(options)) is not None:
            return {**auto_or_number, **node}
        if len(options) != 1:
            raise ValueError(f"a structural schema has no unions: {raw}")
        return {**_resolve(options[0], definitions), **node}
    return node


def _auto_or_number(options: list[Schema]) -> Schema | None:
    """The one union that a structural schema can say: a whole number within bounds, or one word."""
    words = [option["const"] for option in options if option.get("type") == "string" and "const" in option]
    numbers = [option for option in options if option.get("type") == "integer"]
    if len(options) != 2 or len(words) != 1 or len(numbers) != 1:
        return None
    low, high = numbers[0]["minimum"], numbers[0]["maximum"]
    rule = CelRule(
        rule=f"type(self) == int ? (int(self) >= {low} && int(self) <= {high}) : string(self) == '{words[0]}'",
        message=f"must be {words[0]} or a whole number from {low} to {high}",
    )
    return {"x-kubernetes-int-or-string": True, "x-kubernetes-validations": [rule.to_wire()]}


def _add_model_extras(model: type[BaseModel], schema: Schema) -> None:
    """Adds to ``schema``, in place, what JSON Schema cannot say: CEL rules, and the default of a section."""
    if issubclass(model, RecordModel):
        # An operator that is newer than the CRD writes fields which would be refused, or taken away, without this.
        schema["x-kubernetes-preserve-unknown-fields"] = True
    if issubclass(model, ApiModel) and model.cel_rules:
        schema["x-kubernetes-validations"] = [rule.to_wire() for rule in model.cel_rules]
    for name, field in model.model_fields.items():
        child = _model_of(field.annotation)
        if child is None:
            continue
        property_schema = schema["properties"][field.alias or name]
        _add_model_extras(child, property_schema.get("items", property_schema))
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, ApiModel) and not isinstance(default, RecordModel):
            # In full: the API server checks CEL rules against a default before it fills in the defaults below it.
            property_schema["default"] = default.to_wire()


def _shorten(node: Schema) -> None:
    """Says in ``node``, in place, of a section with the fields of one beside it only that it has them.

    A CRD that is too large cannot be applied by ``kubectl apply``.
    """
    seen: dict[str, str] = {}
    for name, child in node.get("properties", {}).items():
        text = json.dumps(child.get("properties", {}), sort_keys=True)
        if text in seen and child.get("properties"):
            _refer(child, f"As in {seen[text]}.")
        else:
            seen[text] = name
            _shorten(child)
    if "items" in node:
        _shorten(node["items"])


def _leave_to_the_writer(node: Schema) -> None:
    """Takes from a status, in place, bounds that its one writer keeps anyway: a status is never to be refused."""
    for bound in ("minimum", "pattern"):
        node.pop(bound, None)
    for child in (*node.get("properties", {}).values(), *filter(None, [node.get("items")])):
        _leave_to_the_writer(child)


def _refer(node: Schema, text: str) -> None:
    for child in node.get("properties", {}).values():
        child["description"] = min(child["description"], text, key=len)
        _refer(child, text)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in ``annotation``: itself, or inside Optional, list or Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_of(argument)
        if found is not None:
            return found
    return None


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())

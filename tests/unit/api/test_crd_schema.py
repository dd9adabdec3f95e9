"""The CustomResourceDefinition as a value: what the API server would refuse, and what a reader would miss."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_api import RULES, LoRAFineTuneSpec
from lora_api.crd import RESOURCES, RUN, build_crd
from lora_api.finetune import MUTABLE
from tools.generate import render_files

ROOT = Path(__file__).resolve().parents[3]
VERSION = build_crd()["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
METADATA = "metadata"


def walk(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a schema with its path; ``[]`` stands for the items of a list, ``*`` for the values of a map."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from walk(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from walk(node["additionalProperties"], f"{path}.*")


NODES = dict(walk(SCHEMA))


def test_every_field_has_a_description_that_is_a_sentence() -> None:
    fields = {
        path: node for path, node in NODES.items() if path not in ("", METADATA) and not path.endswith(("[]", "*"))
    }
    wrong = [path for path, node in fields.items() if not node.get("description", "").endswith((".", ")."))]
    assert len(fields) > 80
    assert wrong == []


UNITS = {
    "spec.training.warmupRatio": "0 to 0.5",
    "spec.lora.dropout": "probability",
    "spec.dataset.maxSeqLength": "tokens",
    "spec.dataset.evalFraction": "Share",
    "spec.training.epochs": "Passes",
    "spec.training.maxSteps": "steps",
    "spec.training.globalBatchSize": "Sequences",
    "spec.training.microBatchSize": "Sequences",
    "spec.training.maxGradNorm": "L2 norm",
    "spec.checkpoint.everySteps": "optimizer steps",
    "spec.podTemplate.tolerations[].tolerationSeconds": "seconds",
    "status.progress.loss": "nats",
    "status.progress.tokensPerSecond": "Tokens per second",
    "status.progress.etaSeconds": "Seconds",
    "status.adapter.sizeBytes": "bytes",
}


@pytest.mark.parametrize("path", UNITS)
def test_a_quantity_says_its_unit(path: str) -> None:
    assert UNITS[path] in NODES[path]["description"]


def test_every_node_is_structural() -> None:
    for path, node in NODES.items():
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
            continue
        if node.get("x-kubernetes-preserve-unknown-fields") and "type" not in node:
            continue
        assert node.get("type") in {"object", "array", "string", "integer", "number", "boolean"}, path
        assert {"$ref", "anyOf", "oneOf", "allOf", "const", "title"}.isdisjoint(node), path
        assert node["type"] != "array" or "items" in node, path
        assert not ({"properties", "additionalProperties"} <= node.keys()), path
        assert set(node.get("required", [])) <= set(node.get("properties", {})), path


def test_what_a_user_writes_is_bounded() -> None:
    """Bounds keep objects small, and the cost of the rules within the budget of the API server."""
    for path, node in NODES.items():
        if not path.startswith("spec"):
            continue
        if node.get("x-kubernetes-int-or-string"):
            assert node["x-kubernetes-validations"], path
            continue
        if "type" not in node:  # each bound is one for values of its own kind
            assert {"maxLength", "minimum", "maxItems", "maxProperties", "not"} <= node.keys(), path
            continue
        kind = node["type"]
        if kind == "string":
            assert "maxLength" in node or "enum" in node, path
        elif kind in ("integer", "number"):
            assert {"minimum", "maximum"} <= node.keys(), path
        elif kind == "array":
            assert {"maxItems", "x-kubernetes-list-type"} <= node.keys(), path
        elif "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_only_the_spec_is_required() -> None:
    assert SCHEMA["required"] == ["spec"]
    assert SCHEMA["properties"]["spec"]["required"] == ["baseModel", "dataset", "training"]


def test_the_operator_alone_writes_status_so_it_has_no_default() -> None:
    assert "default" not in SCHEMA["properties"]["status"]


def test_a_default_of_a_section_is_what_its_fields_default_to() -> None:
    for path, node in NODES.items():
        if "properties" in node and "default" in node:
            fields = {name: child["default"] for name, child in node["properties"].items() if "default" in child}
            assert node["default"] == fields, path


def test_lists_with_keys_merge_by_them() -> None:
    keys = {
        path: node["x-kubernetes-list-map-keys"] for path, node in NODES.items() if "x-kubernetes-list-map-keys" in node
    }
    assert keys == {
        "spec.podTemplate.env": ["name"],
        "spec.podTemplate.imagePullSecrets": ["name"],
        "status.conditions": ["type"],
    }
    for path, names in keys.items():
        assert set(names) <= set(NODES[path]["items"]["required"])


def test_every_rule_of_a_section_names_the_field_that_breaks_it() -> None:
    """All but the two on metadata, whose fields a CRD cannot point at."""
    sections = [node for node in NODES.values() if node.get("type") == "object"]
    rules = [rule for node in sections for rule in node.get("x-kubernetes-validations", [])]
    assert len(rules) > 30
    without = [rule["message"].split(" ")[0] for rule in rules if "fieldPath" not in rule]
    assert without == ["metadata.name", "metadata.name"]


def test_a_field_path_of_a_rule_leads_to_a_field() -> None:
    for path, node in NODES.items():
        for rule in node.get("x-kubernetes-validations", []):
            if "fieldPath" in rule:
                assert f"{path}{rule['fieldPath']}".lstrip(".") in NODES


def test_a_column_shows_a_field() -> None:
    for column in RUN.columns:
        path = column["jsonPath"].lstrip(".")
        assert path == "metadata.creationTimestamp" or path in NODES, column["name"]


def test_names_and_subresources() -> None:
    crd = build_crd()
    assert crd["metadata"]["name"] == "lorafinetunes.lorafinetune.io"
    assert crd["spec"]["scope"] == "Namespaced"
    assert crd["spec"]["names"]["shortNames"] == ["lft"]
    assert crd["spec"]["names"]["categories"] == ["all"]
    assert VERSION["subresources"] == {"status": {}}


def test_the_crd_is_small_enough_for_apply() -> None:
    """`kubectl apply` keeps a copy, as JSON, in an annotation of at most 256 KiB; the project allows a quarter of it.

    5 KiB of it are what names the field of an edit, down to the last part of its path.
    """
    assert len(json.dumps(build_crd(), separators=(",", ":"))) <= 64 * 1024


def test_generated_files_are_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in render_files().items() if path.read_text() != text]
    assert stale == [], "run `make generate`"


def test_the_file_holds_the_schema() -> None:
    crd = yaml.safe_load((ROOT / "crds" / "lorafinetunes.lorafinetune.io.yaml").read_text())
    assert crd == json.loads(json.dumps(build_crd()))


def test_the_rule_against_changes_knows_every_field() -> None:
    rules = SCHEMA["x-kubernetes-validations"]
    (rule,) = (rule for rule in rules if "oldSelf" in rule["rule"])
    fields = [name for name in NODES["spec"]["properties"] if name != "runPolicy"]
    fields += [name for name in NODES["spec.runPolicy"]["properties"] if name not in MUTABLE]
    assert [name for name in fields if f"{name}]==[o" not in rule["rule"]] == []
    assert [name for name in MUTABLE if f"{name}]==" in rule["rule"]] == []
    assert set(MUTABLE) <= set(NODES["spec.runPolicy"]["properties"])
    named = [path.rpartition(".")[2] for path in NODES if re.fullmatch(r"spec([.]\w+){2,}", path)]
    assert len(named) > 80
    texts = set(re.findall(r"'(\w+)[.]?'", rule["messageExpression"]))
    assert [name for name in named if name not in texts | set(MUTABLE)] == []


def test_a_form_is_said_in_words() -> None:
    """A user does not read "should match '^[a-z0-9]...'"."""
    for resource in RESOURCES:
        schema = build_crd(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        patterns = {node["pattern"] for _, node in walk(schema) if "pattern" in node}
        assert [pattern for pattern in patterns if not re.match(r"a quantity such as [^|]*\^\|", pattern)] == []


@pytest.mark.parametrize(
    "text", ["", "a quantity such as 4, 500m or 64Gi", "a quantity such as 4, 500m or 64Gi^", "8 GB"]
)
def test_the_words_before_a_pattern_are_no_form_themselves(text: str) -> None:
    pattern = NODES["spec.podTemplate.resources.limits.*"]["pattern"]
    assert re.search(pattern, "64Gi")
    assert not re.search(pattern, text)


def test_an_absent_section_is_the_same_as_an_empty_one() -> None:
    base = {
        "baseModel": {"uri": "hf://o/m"},
        "dataset": {"train": {"uri": "hf://o/d"}},
        "training": {"epochs": 1},
    }
    sections = [name for name in SCHEMA["properties"]["spec"]["properties"] if "default" in NODES[f"spec.{name}"]]
    assert len(sections) == 8
    assert LoRAFineTuneSpec.model_validate(base | {name: {} for name in sections}) == LoRAFineTuneSpec.model_validate(
        base
    )


def test_the_reference_has_every_field_and_every_failure() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    names = {part.strip("[]") for path in NODES if path != METADATA for part in path.split(".")} - {
        "",
        "*",
        "spec",
        "status",
    }
    assert [name for name in sorted(names - {"apiVersion", "kind"}) if f"`{name}`" not in text] == []
    for rule in RULES:
        assert f"\n| `{rule}` |" in text

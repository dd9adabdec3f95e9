"""What the CRDs of today may not do to those who are not of today."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.skew.releases import RECORDED, ROOT

NAMES = sorted(path.name for path in (RECORDED / "crds").iterdir())
Schema = dict[str, Any]


def schema_of(directory: Path, name: str) -> Schema:
    version = yaml.safe_load((directory / name).read_text())["spec"]["versions"][0]
    schema: Schema = version["schema"]["openAPIV3Schema"]["properties"]
    return schema


def walk(node: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from walk(node[key], f"{path}[]")


def specs(name: str) -> tuple[dict[str, Schema], dict[str, Schema]]:
    """By path: in the release before, and today."""
    old, new = (dict(walk(schema_of(at, name)["spec"], "spec")) for at in (RECORDED / "crds", ROOT / "crds"))
    return old, new


@pytest.mark.parametrize("name", NAMES)
def test_a_new_field_of_a_specification_has_no_default(name: str) -> None:
    """The API server would put it into every run, and the operator of the release before would refuse them all."""
    old, new = specs(name)
    defaulted = [path for path in sorted(new.keys() - old.keys()) if "default" in new[path]]
    assert defaulted == [], "make it optional without a default, and let the code that reads it know what that means"
    for path, node in old.items():
        asked = set(new[path].get("required", ())) - set(node.get("required", ()))
        assert asked == set(), f"{path}: runs that exist do not have it"


@pytest.mark.parametrize("name", NAMES)
def test_no_field_of_a_specification_is_gone_or_means_something_else(name: str) -> None:
    old, new = specs(name)
    assert old.keys() - new.keys() == set()
    for path, node in old.items():
        kinds = ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")
        wider = node.get("type") in ("string", None) and any(new[path].get(kind) for kind in kinds)
        assert wider or new[path].get("type") == node.get("type"), path
        if "enum" in new[path]:
            assert set(node["enum"]) <= set(new[path]["enum"]), path
        if "properties" not in node:
            assert new[path].get("default") == node.get("default"), f"{path}: runs without it would ask for another"


def test_a_status_takes_what_the_next_release_writes() -> None:
    status = dict(walk(schema_of(ROOT / "crds", "lorafinetunes.lorafinetune.io.yaml")["status"], "status"))
    objects = {path: node for path, node in status.items() if "properties" in node}
    closed = [path for path, node in objects.items() if not node.get("x-kubernetes-preserve-unknown-fields")]
    assert closed == []
    assert "enum" not in status["status.phase"]

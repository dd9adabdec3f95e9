"""`helm upgrade --reuse-values`: the values of an earlier release are all there is, and what is new has its default."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.chart.conftest import CHART

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "files" / "defaults.yaml").read_text())
SECTIONS = sorted({path[: dot.start()] for path in DEFAULTS for dot in re.finditer(r"\.", path)})

Reuse = Callable[[dict[str, Any]], str]


@pytest.fixture
def reuse(helm: Callable[..., str], tmp_path: Path) -> Reuse:
    """The manifests of the chart where the given values take the place of its own, as --reuse-values has it."""
    chart = tmp_path / CHART.name
    shutil.copytree(CHART, chart)

    def render(values: dict[str, Any]) -> str:
        (chart / "values.yaml").write_text(yaml.safe_dump(values))
        return helm("template", "lora-operator", str(chart), "--namespace=lora-system")

    return render


@pytest.fixture(scope="module")
def whole(render: Callable[..., str]) -> str:
    return render(crds=True)


def without(path: str) -> dict[str, Any]:
    """The chart's values without one of them, or without a whole section."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(VALUES))
    *sections, name = path.split(".")
    at = values
    for section in sections:
        at = at[section]
    del at[name]
    return values


@pytest.mark.parametrize("path", [*DEFAULTS, *SECTIONS])
def test_a_value_that_an_earlier_chart_did_not_have_has_its_default(reuse: Reuse, whole: str, path: str) -> None:
    assert reuse(without(path)) == whole


def test_no_value_at_all_is_every_default(reuse: Reuse, whole: str) -> None:
    assert reuse({}) == whole


def test_a_value_that_is_not_used_any_more_is_taken_and_changes_nothing(render: Callable[..., str]) -> None:
    assert render("operator.maxUnchargedRestarts=0") == render()


def test_a_null_is_no_value(render: Callable[..., str]) -> None:
    assert render("operator.concurrency=null", "metrics=null") == render()


def test_what_is_off_or_empty_by_wish_stays_so(render: Callable[..., str]) -> None:
    text = render(
        "operator.preflight=false", "operator.restartBackoffSeconds=0", "resources.limits.memory=null",
        "defaultRuntime.spec.podTemplate=null", "rbac.create=false",
    )  # fmt: skip
    assert "--preflight=off" in text
    assert "--restart-backoff=0" in text
    assert "--default-runtime={}" in text
    assert "limits: {}" in text
    assert "lora-operator-runs" not in text


def leaves(values: Any, path: str = "") -> Iterator[str]:
    yield path
    if isinstance(values, dict) and path not in DEFAULTS:
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}".lstrip("."))


def test_every_value_has_a_default_and_every_template_asks_for_it_first() -> None:
    assert {path for path in leaves(VALUES) if path and path not in SECTIONS} == set(DEFAULTS)
    for template in sorted((CHART / "templates").glob("[!_]*")):
        assert re.match(r'\{\{- include "lora-operator\.defaults" \. -?\}\}\n', template.read_text()), template.name

"""Flags win over the environment, the environment over defaults; and the chart knows them."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from lora_operator.settings import Settings

ROOT = Path(__file__).parents[3]


def test_flags_environment_defaults() -> None:
    settings = Settings.parse(
        ["--failure-grace", "5", "--namespaces", "a, b,"],
        {"LORA_FAILURE_GRACE": "7", "LORA_CONCURRENCY": "3", "LORA_TRAINER_IMAGE": "image"},
    )
    assert (settings.failure_grace, settings.namespaces) == (5.0, ("a", "b"))
    assert (settings.concurrency, settings.trainer_image, settings.http_port) == (3, "image", 8080)
    assert Settings.parse([], {}) == Settings()


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.parse(["--help"], {})
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in fields(Settings):
        assert "--" + setting.name.replace("_", "-") in text
        assert setting.metadata["env"] in text
        assert setting.metadata["help"] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--failure-grace", "soon"], "float that is 0 or more"),
        (["--concurrency", "-1"], "int that is 0 or more"),
        (["--log-level", "loud"], "invalid choice"),
        (["--unknown"], "unrecognized arguments"),
        (
            ["--default-runtime", '{"limits": {"maxNode": 1}}'],
            "--default-runtime: limits.maxNode: Extra inputs are not",
        ),
        (["--default-runtime", "{"], "--default-runtime: Invalid JSON"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.parse(arguments, {})
    assert message in capsys.readouterr().err


def test_wrong_values_in_the_environment_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.parse([], {"LORA_API_QPS": "fast"})
    assert "--api-qps" in capsys.readouterr().err


def test_the_chart_sets_only_what_exists() -> None:
    text = (ROOT / "charts" / "lora-operator" / "templates" / "deployment.yaml").read_text()
    flags = {"--" + setting.name.replace("_", "-") for setting in fields(Settings)}
    variables = {setting.metadata["env"] for setting in fields(Settings)}
    assert set(re.findall(r"(--[a-z-]+)=", text)) <= flags
    assert set(re.findall(r"\bLORA_[A-Z_]+\b", text)) <= variables

"""JSON that the API server can read as YAML."""

import json

import pytest
import yaml

from lora_operator.kube.yamlbody import encode


@pytest.mark.parametrize(
    "text",
    [
        "GLHF! \U0001f3d6\ufe0f",
        'a "quote", a \\ and a \\ud83c that was written out',
        "tab\t, line\n, nothing \x00, escape \x1b[31m",
        "delete \x7f, next line \x85, and \x9b of the upper controls",
        "mark \ufeff, no characters \ufffe \uffff",
        "\u00fc \u4e2d \u2028",
    ],
)
def test_a_text_comes_through_yaml_and_json(text: str) -> None:
    body = encode({"message": text})
    assert yaml.safe_load(body) == json.loads(body) == {"message": text}


def test_half_a_pair_is_no_character() -> None:
    assert json.loads(encode({"message": "a \ud83c b"})) == {"message": "a \ufffd b"}

"""Names that kopf keeps to itself are used in one file, under one version (decision 040)."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_kopf_is_pinned_to_one_release() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [text for text in project["optional-dependencies"]["operator"] if text.startswith("kopf")]
    pinned = re.fullmatch(r"kopf==(\d+\.\d+\.\d+)", needed)
    assert pinned, f"{needed} is a range, and private names change within ranges"
    for constraints in ("operator.txt", "dev.txt"):
        assert f"kopf=={pinned[1]}\n" in (ROOT / "constraints" / constraints).read_text()


def test_private_names_of_kopf_are_imported_in_one_file() -> None:
    sources = (ROOT / "operator/lora_operator").rglob("*.py")
    found = {path.name for path in sources if re.search(r"(from|import) kopf\._", path.read_text())}
    assert found == {"watch.py"}

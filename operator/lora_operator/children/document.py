"""The run document: the resolved run as JSON (lora_api.RunSpec), which travels in an annotation of the pods."""

import json
from collections.abc import Mapping
from typing import Any

from lora_api import RUN_VERSION, LoRAFineTune, build_run_spec
from lora_api.runversions import to_version


def build_document(
    run: LoRAFineTune, attempt: int, run_version: int = RUN_VERSION, control_key: str | None = None
) -> str:
    """What ``attempt`` is told, by an operator whose trainer reads documents up to ``run_version``."""
    return _write(to_version(build_run_spec(run, attempt, control_key), run_version).document)


def build_preflight_document(run: LoRAFineTune) -> str:
    """What a preflight is told: what the first attempt would be, but for its key.

    Whole, whatever its trainer reads: an old one is to refuse what it does not know, rather than not to check it.
    """
    return _write(to_version(build_run_spec(run, 1), RUN_VERSION).document)


def _write(document: Mapping[str, Any]) -> str:
    """Without blanks: every watch of pods carries it, once for each pod."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True, ensure_ascii=False)

"""The ConfigMap: the resolved run as one JSON document (lora_api.RunSpec), mounted into every pod."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from lora_api import RUN_VERSION, LoRAFineTune, build_run_spec
from lora_api.run import RUN_FILE
from lora_api.runversions import to_version
from lora_operator.names import build_metadata, child_labels, child_name, preflight_labels, preflight_name


def build_configmap(
    run: LoRAFineTune, attempt: int, run_version: int = RUN_VERSION, control_key: str | None = None
) -> dict[str, Any]:
    """The ConfigMap of ``attempt``, for a trainer that reads documents up to ``run_version``."""
    name, labels = child_name(run.metadata.name, attempt), child_labels(run.metadata.name, attempt)
    return _build(run, name, labels, to_version(build_run_spec(run, attempt, control_key), run_version).document)


def build_preflight_configmap(run: LoRAFineTune, number: int) -> dict[str, Any]:
    """The ConfigMap of a preflight: what the first attempt would get, but for its key.

    Whole, whatever its trainer reads: an old one is to refuse what it does not know, rather than not to check it.
    """
    name, labels = preflight_name(run.metadata.name, number), preflight_labels(run.metadata.name, number)
    return _build(run, name, labels, to_version(build_run_spec(run, 1), RUN_VERSION).document)


def _build(run: LoRAFineTune, name: str, labels: Mapping[str, str], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Immutable: pods keep the input that they started with."""
    document = json.dumps(spec, indent=2, sort_keys=True, ensure_ascii=False)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(run, name, labels),
        "immutable": True,
        "data": {PurePosixPath(RUN_FILE).name: document + "\n"},
    }

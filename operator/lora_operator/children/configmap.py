"""The ConfigMap: the resolved run as one JSON document (lora_api.RunSpec), mounted into every pod."""

import json
from pathlib import PurePosixPath
from typing import Any

from lora_api import LoRAFineTune, build_run_spec
from lora_api.run import RUN_FILE
from lora_operator.children.names import build_metadata


def build_configmap(run: LoRAFineTune, attempt: int) -> dict[str, Any]:
    """The ConfigMap of ``attempt``. Immutable: an attempt keeps the input that it started with."""
    document = json.dumps(build_run_spec(run, attempt).to_wire(), indent=2, sort_keys=True, ensure_ascii=False)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(run, attempt),
        "immutable": True,
        "data": {PurePosixPath(RUN_FILE).name: document + "\n"},
    }

"""Reads a source as preflight does and says what came of it and what it cost: ``python -m ... URI``."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

KIB_IN_MIB = 1024


def main(uri: str) -> dict[str, Any]:
    from lora_api.sources import DataSource
    from lora_trainer.data import read_records
    from lora_trainer.errors import classify, describe
    from lora_trainer.sources import fetch_data

    found: dict[str, Any] = {}
    try:
        files = fetch_data(DataSource(uri=uri), Path("/nowhere"))
        found["records"] = len(read_records(files, "text")[1])
    except Exception as error:  # noqa: BLE001 - what is said of it is what is asked for
        found |= {"class": classify(error).value, "message": describe(error)}
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / KIB_IN_MIB
    return found | {"own": most_memory(), "child": child}


def most_memory() -> float:
    """MiB. What getrusage says of a process itself has in it what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / KIB_IN_MIB


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])))

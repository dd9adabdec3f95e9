"""Tokenizes a file of records and says what memory that took: ``python -m tests.trainer.bigdata MODEL FILE OUT``."""

import itertools
import json
import resource
import sys
from pathlib import Path
from typing import Any

KIB_IN_MIB = 1024


def most_memory() -> float:
    """The most memory that this process ever had, pages of mapped files included, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_IN_MIB


def main(model: Path, file: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    from lora_api.run import RunSpec
    from lora_trainer.prepare import prepare_data
    from lora_trainer.settings import Place
    from lora_trainer.sources import Sources

    document: dict[str, Any] = {
        "namespace": "tests", "name": "big", "uid": "u", "baseModel": {"uri": f"file://{model}"},
        "dataset": {"train": {"uri": f"file://{file}"}, "maxSeqLength": 64, "packing": True},
        "training": {"epochs": 1}, "publish": {"store": f"file://{directory}/store"},
    }  # fmt: skip
    run, place = RunSpec.model_validate(document), Place(0, 0, 1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    few = directory / "few.jsonl"
    with file.open() as lines:
        few.write_text("".join(itertools.islice(lines, 8)))
    prepare_data(run, Sources(few, [few], None), tokenizer, place, directory / "few")
    before = most_memory()
    data = prepare_data(run, Sources(file, [file], None), tokenizer, place, directory / "all")
    tokens = sum(len(document.ids) for sequence in data.train for document in sequence)
    report = {"grownMiB": most_memory() - before, "tokens": tokens, "data": data.report.to_wire()}
    (directory / "result.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""What the tour of docs/training.md works on: a tiny random model, records, and a run document.

``python -m tests.support.tour DIRECTORY`` writes them.
"""

import json
import sys
from pathlib import Path

from tests.support.tiny import make_model, make_rows, write_rows


def make_tour(directory: Path) -> Path:
    """Writes model, train.jsonl, eval.jsonl and run.json (two processes on the CPU). Returns the run document."""
    make_model(directory / "model")
    write_rows(directory / "train.jsonl", make_rows(200))
    write_rows(directory / "eval.jsonl", make_rows(16, start=500))
    here = f"file://{directory.resolve()}"
    run = {
        "namespace": "tour",
        "name": "shout",
        "uid": "tour-1",
        "baseModel": {"uri": f"{here}/model"},
        "dataset": {
            "train": {"uri": f"{here}/train.jsonl"},
            "eval": {"uri": f"{here}/eval.jsonl"},
            "maxSeqLength": 64,
        },
        "lora": {"r": 8, "alpha": 16},
        "training": {"maxSteps": 20, "learningRate": 0.01, "globalBatchSize": 16, "scheduler": "constant"},
        "parallelism": {"nodes": 2, "gpusPerNode": 0},
        "publish": {"store": f"{here}/store", "gate": {"minEvalLossImprovement": 0.1}},
    }
    document = directory / "run.json"
    document.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return document


if __name__ == "__main__":
    sys.stdout.write(f"{make_tour(Path(sys.argv[1]))}\n")

"""No rank unpickles anything, so no peer can have it run code that way."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_api.run import RunSpec
from lora_trainer.launch import free_port
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import Launched

Make = Callable[..., RunSpec]
Launch = Callable[..., Launched]
ENTRY = "tests.security.trainer.entries:watch_pickles"


def run_gang(fork: Launch, run: RunSpec, stop_at: int | None = None) -> tuple[list[int], list[dict[str, Any]]]:
    """Exit codes of a gang of two pods, and what each rank unpickled."""
    gang = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    pods = [fork(run, ENTRY, PET_NODE_RANK=str(rank), **gang) for rank in range(2)]
    if stop_at is not None:
        pods[0].wait_step(stop_at)
        pods[0].process.send_signal(signal.SIGTERM)
    codes = [pod.wait() for pod in pods]
    found = [json.loads((pod.log.parent / f"unpickled-{rank}.json").read_text()) for rank, pod in enumerate(pods)]
    return codes, found


def test_a_gang_unpickles_nothing_from_its_first_step_to_its_published_adapter(make_run: Make, fork: Launch) -> None:
    """Attack: A PEER sends a pickle, which runs code where it is read. Nothing of a whole life reads one.

    The first attempt decides on its micro-batch, saves a checkpoint and stops; the second goes on from it and
    publishes.
    """
    run = make_run(
        parallelism={"nodes": 2, "gpusPerNode": 0},
        training={"maxSteps": 12, "microBatchSize": "auto", "evalEverySteps": 4},
        checkpoint={"everySteps": 2},
        controlKey="5" * 64,
    )
    codes, stopped = run_gang(fork, run, stop_at=3)
    assert codes == [75, 75]
    codes, resumed = run_gang(fork, run.model_copy(update={"attempt": 2}))
    assert codes == [0, 0]
    for found in (*stopped, *resumed):
        assert found == {"classes": [], "objects": []}


def test_preference_pairs_need_no_pickle_either(make_run: Make, fork: Launch, tmp_path: Path) -> None:
    """Attack: A PEER sends a pickle where TRL would share a fingerprint of the reference model's answers."""
    rows = make_rows(16)
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    source = {"uri": f"file://{tmp_path}/pairs.jsonl"}
    run = make_run(
        parallelism={"nodes": 2, "gpusPerNode": 0},
        dataset={"train": source, "eval": source},
        training={"objective": "dpo", "maxSteps": 2, "evalEverySteps": 1},
        checkpoint={"everySteps": 1},
    )
    codes, ranks = run_gang(fork, run)
    assert codes == [0, 0]
    assert ranks == [{"classes": [], "objects": []}] * 2

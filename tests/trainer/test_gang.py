"""Gangs of two processes, through the launcher: the same losses as one, and what happens when they are hit."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_api.training import Parallelism
from lora_trainer.launch import free_port
from lora_trainer.store import Store
from tests.trainer.runs import Launched, build_run, merge, start_pod, wait_gone
from tests.trainer.zygote import Zygote

Make = Callable[..., RunSpec]
Launch = Callable[..., Launched]
TWO = {"nodes": 2, "gpusPerNode": 0}
STEPS = 8


def two_processes(make_run: Make, **changes: Any) -> RunSpec:
    """A run of eight steps on two processes, with a checkpoint after every second."""
    base: dict[str, Any] = {"parallelism": TWO, "training": {"maxSteps": STEPS}, "checkpoint": {"everySteps": 2}}
    return make_run(**merge(base, changes))


@pytest.fixture(scope="module")
def uninterrupted(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Launched]:
    """The whole run on two processes, with nothing in its way."""
    directory = tmp_path_factory.mktemp("whole")

    def build(**changes: Any) -> RunSpec:
        return build_run(model, data, directory, changes)

    with start_pod(two_processes(build), directory / "pod", zygote=zygote) as pod:
        assert pod.wait() == 0, pod.log.read_text()[-5000:]
        yield pod


def checkpoint_steps(run: RunSpec) -> set[str]:
    """Names of the complete checkpoints in the store."""
    sizes = Store(run.publish.store).sizes("tests/tiny/checkpoints/uid-1")
    return {path.split("/")[-2] for path in sizes if path.endswith("COMPLETE.json")}


def test_two_processes_learn_what_one_learns(
    make_run: Make, fork: Launch, uninterrupted: Launched, tmp_path: Path
) -> None:
    run = two_processes(make_run, publish={"store": f"file://{tmp_path}/alone"})
    alone = fork(run.model_copy(update={"parallelism": Parallelism(nodes=1, gpus_per_node=0)}))
    assert alone.wait() == 0, alone.log.read_text()[-5000:]
    assert set(alone.losses) == set(range(1, STEPS + 1))
    assert uninterrupted.losses == pytest.approx(alone.losses, abs=1e-4)
    one, two = alone.words.adapter, uninterrupted.words.adapter
    assert one is not None
    assert two is not None
    assert two.eval_loss_before == pytest.approx(one.eval_loss_before, abs=1e-4)
    assert two.eval_loss_after == pytest.approx(one.eval_loss_after, abs=1e-4)
    assert one.eval_loss_after is not None
    assert one.eval_loss_before is not None
    assert one.eval_loss_after < one.eval_loss_before


def test_a_run_that_is_stopped_and_then_killed_ends_with_the_losses_of_one_that_was_not(
    make_run: Make, launch: Launch, fork: Launch, uninterrupted: Launched
) -> None:
    run = two_processes(make_run)
    stopped = launch(run)
    stopped.wait_step(3)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.log.read_text()[-5000:]
    assert stopped.words.failure_class == FailureClass.CHECKPOINTED
    reached = max(stopped.losses)
    assert f"step-{reached}" in checkpoint_steps(run)

    killed = launch(run.model_copy(update={"attempt": 2}))
    killed.wait_step(min(reached + 1, STEPS))
    workers = killed.workers
    killed.process.send_signal(signal.SIGKILL)
    killed.wait()
    assert workers
    for pid in workers:
        wait_gone(pid)

    last = fork(run.model_copy(update={"attempt": 3}))
    assert last.wait() == 0, last.log.read_text()[-5000:]
    assert min(last.losses, default=STEPS) > 2
    losses = {**stopped.losses, **killed.losses, **last.losses}
    assert losses == uninterrupted.losses
    adapter, whole = last.words.adapter, uninterrupted.words.adapter
    assert adapter is not None
    assert whole is not None
    assert adapter.eval_loss_before == whole.eval_loss_before
    assert adapter.digest == whole.digest
    assert checkpoint_steps(run) == set()


def test_the_pod_that_is_hit_and_the_pod_that_lost_it_tell_them_apart(make_run: Make, fork: Launch) -> None:
    run = two_processes(make_run, training={"maxSteps": 500}, checkpoint={"everySteps": 500})
    port = str(free_port())
    pods = [
        fork(run, PET_NNODES="2", PET_NPROC_PER_NODE="1", PET_NODE_RANK=str(rank), MASTER_PORT=port)
        for rank in range(2)
    ]
    pods[0].wait_step(2)
    (victim,) = pods[1].workers
    os.kill(victim, signal.SIGKILL)
    assert pods[1].wait(30) == 70
    assert pods[1].words.failure_class == FailureClass.INTERNAL
    assert "SIGKILL" in pods[1].words.message
    assert pods[1].words.rank == 1
    assert pods[0].wait(30) == 73
    assert pods[0].words.failure_class == FailureClass.PEER_LOST
    assert pods[0].words.rank == 0
    assert "rank 1 does not answer" in pods[0].words.message


def test_a_pod_that_hangs_is_given_up_in_bounded_time(make_run: Make, fork: Launch) -> None:
    run = two_processes(
        make_run,
        training={"maxSteps": 500},
        checkpoint={"everySteps": 500},
        parallelism={"collectiveTimeoutSeconds": 10},
    )
    settings = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    pods = [fork(run, PET_NODE_RANK=str(rank), **settings) for rank in range(2)]
    pods[0].wait_step(2)
    (victim,) = pods[1].workers
    os.kill(victim, signal.SIGSTOP)
    assert pods[0].wait(30) == 73, pods[0].log.read_text()[-5000:]
    assert pods[0].words.failure_class == FailureClass.PEER_LOST
    assert pods[0].words.step is not None
    assert pods[0].words.step >= 2
    assert "rank 1 does not answer; it was last seen at the start of step" in pods[0].words.message

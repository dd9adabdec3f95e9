"""What GPUs say, through the real launcher to the termination message; and a dead GPU that leaves its peers alone."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import torch

from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec
from lora_trainer.errors import GPUUnsupportedError, classify
from lora_trainer.gpuerrors import GPU_ERRORS
from lora_trainer.launch import free_port
from lora_trainer.model import training_device
from tests.support.gpuwords import GPU, key_of, read_words, write_words
from tests.trainer.runs import Launched

Make = Callable[..., RunSpec]
Start = Callable[..., Launched]
ONE_GPU = {"parallelism": {"nodes": 1, "gpusPerNode": 1}}
TWO_NODES = {"parallelism": {"nodes": 2, "gpusPerNode": 0}, "training": {"maxSteps": 500}}
AT_ONCE = 8


def test_each_row_reaches_the_termination_message(make_run: Make, fork: Start) -> None:
    """A worker of its own for each, whose training raises the text; a few at a time."""
    run = make_run(**ONE_GPU)
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(GPU_ERRORS), AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, len(GPU_ERRORS)))
        entry = "tests.trainer.entries:fail_as_libraries_do"
        pods = [fork(run, entry, GPU_ERROR=str(number), NVIDIA_VISIBLE_DEVICES=GPU) for number in numbers]
        for number, pod in zip(numbers, pods, strict=True):
            code = pod.wait(90)
            words = pod.words.to_wire()
            del words["at"]
            found[key_of(GPU_ERRORS[number])] = {"exitCode": code, "words": words}
    for row in GPU_ERRORS:
        entry_of_row = found[key_of(row)]
        words = entry_of_row["words"]
        assert words["class"] == row.failure_class, row.text
        assert row.text in words["message"]
        assert words["remedy"] == (row.remedy or RULES[row.failure_class].remedy)
        assert words["rank"] == 0
        assert entry_of_row["exitCode"] == RULES[row.failure_class].exit_code or 137
    if os.environ.get("UPDATE_GOLDEN"):
        write_words(found)
    assert found == read_words(), "the operator's tests read these words: UPDATE_GOLDEN=1 writes them"


@pytest.mark.parametrize("how", ["raises", "aborts"])
def test_a_dead_gpu_is_the_cause_and_its_peer_only_lost_it(how: str, make_run: Make, fork: Start) -> None:
    """Two pods that train for real; on rank 1 the GPU dies after step 2."""
    place = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port()), "DYING_GPU": how}
    run, entry = make_run(**TWO_NODES), "tests.trainer.entries:dying_gpu"
    first, second = (fork(run, entry, PET_NODE_RANK=str(rank), **place) for rank in range(2))
    assert second.wait(90) == RULES[FailureClass.GPU_FAULT].exit_code, second.log.read_text()[-5000:]
    assert (second.words.failure_class, second.words.rank) == (FailureClass.GPU_FAULT, 1)
    assert "uncorrectable ECC error encountered" in second.words.message
    assert ("SIGABRT" in second.words.message) == (how == "aborts")
    assert first.wait(60) in {RULES[kind].exit_code for kind in (FailureClass.PEER_LOST, FailureClass.CHECKPOINTED)}
    assert first.words.failure_class in (FailureClass.PEER_LOST, FailureClass.CHECKPOINTED)
    assert first.words.at <= datetime.now(UTC)


def test_a_dead_gpu_in_a_pod_of_two(make_run: Make, fork: Start) -> None:
    """The launcher of both picks the one whose GPU it was."""
    run = make_run(**TWO_NODES)
    pod = fork(run, "tests.trainer.entries:dying_gpu", DYING_GPU="aborts")
    assert pod.wait(90) == RULES[FailureClass.GPU_FAULT].exit_code, pod.log.read_text()[-5000:]
    assert (pod.words.failure_class, pod.words.rank) == (FailureClass.GPU_FAULT, 1)


def test_where_there_is_no_gpu_the_driver_says_why(make_run: Make) -> None:
    """The real words of CUDA on a machine without a driver."""
    with pytest.raises(RuntimeError, match="NVIDIA driver") as caught:
        training_device(make_run(**ONE_GPU), 0)
    assert classify(caught.value) == FailureClass.GPU_UNAVAILABLE


def test_a_gpu_that_imitates_bfloat16_is_refused_before_anything_is_loaded(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's answers on a T4: torch itself would say that it has bfloat16."""
    answers = {"is_available": True, "device_count": 1, "get_device_name": "Tesla T4", "get_device_capability": (7, 5)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(GPUUnsupportedError, match=r"Tesla T4 has compute capability 7\.5"):
        training_device(make_run(**ONE_GPU), 0)
    assert chosen == []
    run = make_run(**ONE_GPU, quantization={"computeDtype": "float32"})
    assert training_device(run, 0) == torch.device("cuda", 0)
    assert chosen == [0]

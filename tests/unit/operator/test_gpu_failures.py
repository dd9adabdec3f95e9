"""The last words of a GPU's failure, as the real launcher wrote them, beside those of a peer that lost it."""

from dataclasses import replace

import pytest

from lora_api import RULES, FailureClass
from lora_operator.diagnosis.diagnose import diagnose_pods, diagnose_root
from lora_trainer.gpuerrors import GPU_ERRORS, Blame, GpuError
from tests.support.gpuwords import key_of, read_words, termination_at
from tests.unit.operator.builders import NOW, a_job, ago, ended, said

WORDS = read_words()


def test_the_words_are_those_of_the_table() -> None:
    assert list(WORDS) == [key_of(row) for row in GPU_ERRORS], (
        "UPDATE_GOLDEN=1 pytest tests/trainer/test_gpu_failures.py"
    )


@pytest.mark.parametrize("row", GPU_ERRORS, ids=key_of)
def test_the_failure_of_the_run_is_the_gpus(row: GpuError) -> None:
    """Its peer spoke first, and is not the cause where the GPU's own pod says more than that it lost a peer."""
    entry = WORDS[key_of(row)]
    peer_at = ago(3) if row.blame is Blame.PEER else ago(9)
    peer = ended(0, 73, said("PeerLost", "Connection closed by peer", at=peer_at, rank=0), node="gpu-1")
    cause = ended(1, entry["exitCode"], termination_at(entry, ago(6)), node="gpu-7")
    symptoms = diagnose_pods([peer, cause], a_job(), NOW, grace=30, processes_per_node=8)
    failure = diagnose_root(symptoms, [peer, cause], 1, NOW)
    words = entry["words"]
    assert (failure.failure_class, failure.pod, failure.node) == (row.failure_class, cause.name, "gpu-7")
    assert (failure.rank, failure.exit_code) == (words["rank"], entry["exitCode"])
    assert failure.remedy == (row.remedy or RULES[row.failure_class].remedy)
    prefix = "Node gpu-7, " if RULES[row.failure_class].node else ""
    assert failure.message == prefix + words["message"]


def test_a_pod_that_never_had_a_node_names_none() -> None:
    pod = replace(ended(1, 80, said("GPUFault", "lost")), node="")
    failure = diagnose_root(diagnose_pods([pod], a_job(), NOW, grace=30, processes_per_node=1), [pod], 1, NOW)
    assert (failure.failure_class, failure.node, failure.message) == (FailureClass.GPU_FAULT, None, "lost")

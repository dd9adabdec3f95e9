"""Which strategy a run takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_api.training import LoRA, Parallelism, Quantization
from lora_trainer.errors import BadSpecError
from lora_trainer.estimate import estimate
from lora_trainer.job import Job
from lora_trainer.memory import plan_memory
from lora_trainer.modelshape import read_shape
from lora_trainer.strategy import Strategy, decide_strategy, has_room
from tests.unit.trainer.published import LLAMA_3_8B, LLAMA_3_70B

ROOT = Path(__file__).parents[3]
ONE_NODE = {"nodes": 1, "gpusPerNode": 8}
TWO_NODES = {"nodes": 2, "gpusPerNode": 8}
CPUS = {"nodes": 4, "gpusPerNode": 0}

SMALL, TIGHT, NODE, LARGE = 10.0, 16.0, 24.0, 79.0
"""GiB of a GPU, for Llama-3-70B: too small for 16 of them, enough for 16 but not for 8, enough for 8 but not to hold
gathered layers, and enough for those too."""


def decide(parallelism: dict[str, Any], device_gib: float | None) -> Strategy:
    asked = Parallelism.model_validate(parallelism)
    job = Job(
        read_shape(LLAMA_3_70B),
        LoRA(r=16),
        Quantization(),
        micro_batch=1,
        sequence=1024,
        world_size=asked.world_size,
        cpu_offload=asked.cpu_offload,
    )
    return decide_strategy(asked, job, device_gib)


CASES: dict[str, tuple[dict[str, Any], float | None, Strategy]] = {
    "one process has nobody to share with": ({}, LARGE, Strategy("alone")),
    "one process, whatever is asked": ({"strategy": "fsdp"}, LARGE, Strategy("alone")),
    "one process that offloads is a mesh of one": ({"cpuOffload": True}, LARGE, Strategy("fsdp", offload=True)),
    "one node shards over its GPUs": (ONE_NODE, NODE, Strategy("fsdp", shards=8)),
    "over nodes, each holds a copy if it can": (TWO_NODES, NODE, Strategy("hsdp", replicas=2, shards=8)),
    "over nodes, none can hold a copy": (TWO_NODES, TIGHT, Strategy("fsdp", shards=16)),
    "over nodes, and the memory is not known": (TWO_NODES, None, Strategy("fsdp", shards=16)),
    "over nodes of one GPU there is nothing inside a node": (
        {"nodes": 4, "gpusPerNode": 1}, NODE, Strategy("fsdp", shards=4),
    ),
    "CPUs count as nodes of one": (CPUS, None, Strategy("fsdp", shards=4)),
    "fsdp is not second-guessed": (TWO_NODES | {"strategy": "fsdp"}, NODE, Strategy("fsdp", shards=16)),
    "hsdp takes a node's processes": (
        TWO_NODES | {"strategy": "hsdp"}, SMALL, Strategy("hsdp", replicas=2, shards=8),
    ),
    "hsdp with groups smaller than a node": (
        ONE_NODE | {"strategy": "hsdp", "shardSize": 2}, SMALL, Strategy("hsdp", replicas=4, shards=2),
    ),
    "hsdp with one group is fsdp": (
        ONE_NODE | {"strategy": "hsdp", "shardSize": 8}, SMALL, Strategy("fsdp", shards=8),
    ),
    "hsdp on CPUs": (CPUS | {"strategy": "hsdp", "shardSize": 2}, None, Strategy("hsdp", 2, 2)),
    "ddp has whole copies": (TWO_NODES | {"strategy": "ddp"}, LARGE, Strategy("ddp", replicas=16)),
    "with room, layers stay gathered": (ONE_NODE, LARGE, Strategy("fsdp", shards=8, reshard=False)),
    "with room over nodes too": (TWO_NODES, LARGE, Strategy("hsdp", replicas=2, shards=8, reshard=False)),
    "offloaded layers never stay": (
        ONE_NODE | {"cpuOffload": True}, LARGE, Strategy("fsdp", shards=8, offload=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_strategy(case: str) -> None:
    parallelism, device_gib, expected = CASES[case]
    assert decide(parallelism, device_gib) == expected


def test_without_a_memory_plan_everything_is_sharded() -> None:
    assert decide_strategy(Parallelism.model_validate(TWO_NODES)) == Strategy("fsdp", shards=16)


@pytest.mark.parametrize(
    ("parallelism", "words"),
    [
        (CPUS | {"nodes": 3, "strategy": "hsdp", "shardSize": 2}, "shardSize: 3 processes do not divide"),
        (CPUS | {"strategy": "hsdp"}, "shardSize: 4 processes do not divide into groups of 1"),
        (CPUS | {"strategy": "fsdp", "shardSize": 2}, "shardSize belongs to strategy hsdp"),
        (CPUS | {"strategy": "ddp", "cpuOffload": True}, "cpuOffload needs sharded weights"),
        ({"strategy": "ddp", "cpuOffload": True}, "cpuOffload needs sharded weights"),
    ],
)
def test_what_does_not_go_together_is_refused_without_an_api_server_too(
    parallelism: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadSpecError, match=rf"^parallelism\.{words}"):
        decide_strategy(Parallelism.model_validate(parallelism))


def test_each_copy_has_all_its_parts_on_neighbouring_ranks() -> None:
    strategy = Strategy("hsdp", replicas=3, shards=4)
    for copy in range(3):
        assert [strategy.part(rank) for rank in range(4 * copy, 4 * copy + 4)] == [0, 1, 2, 3]


def test_layers_may_stay_gathered_where_the_weights_fit_whole_beside_the_rest() -> None:
    small = Job(read_shape(LLAMA_3_8B), LoRA(r=16), Quantization(), micro_batch=1, sequence=2048, world_size=8)
    sharded, whole = (plan_memory(replace(small, shard_size=shards)).safe for shards in (8, 1))
    assert not has_room(small, 8, sharded + 0.5)
    assert has_room(small, 8, whole + 1)


def test_the_document_shows_what_offload_saves(tmp_path: Path) -> None:
    config, manifest = tmp_path / "config.json", ROOT / "examples" / "llama-3-70b-offload.yaml"
    config.write_text(json.dumps(LLAMA_3_70B))
    kept = tmp_path / "kept.yaml"
    kept.write_text(manifest.read_text().replace(", cpuOffload: true", ""))
    document = (ROOT / "docs" / "parallelism.md").read_text()
    offloaded, whole = estimate(manifest, config, 22.0), estimate(kept, config, 22.0)
    assert offloaded.fits
    assert not whole.fits
    for figure in (offloaded.plan.total, offloaded.plan.safe, whole.plan.safe):
        assert f"{figure:.2f}" in document


def test_the_document_shows_what_estimate_prints(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_3_8B))
    printed = estimate(ROOT / "examples" / "llama-3-8b.yaml", config, 10.0).to_text()
    block = "\n".join(f"    {line}".rstrip() for line in printed.splitlines())
    assert f"\n\n{block}\n\n" in (ROOT / "docs" / "memory.md").read_text()

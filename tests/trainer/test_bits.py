"""Packed weights are what was loaded, to the last bit, however they are spread; and what is done where they are not."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec
from lora_trainer.digest import BLOCK_BYTES, combined, digest
from lora_trainer.store import Store
from tests.support.families import make_family
from tests.support.tiny import make_model
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import Launched, build_run

Results = dict[str, list[dict[str, Any]]]

WORK = "tests.trainer.gang_bits"

STRATEGIES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "alone": ([0], {"kind": "alone"}),
    "alone-offload": ([1], {"kind": "fsdp", "offload": True}),
    "ddp-2": ([2, 3], {"kind": "ddp", "replicas": 2}),
    "fsdp-2": ([0, 1], {"kind": "fsdp", "shards": 2}),
    "fsdp-3": ([0, 1, 2], {"kind": "fsdp", "shards": 3}),
    "fsdp-4": ([0, 1, 2, 3], {"kind": "fsdp", "shards": 4}),
    "fsdp-2-offload": ([2, 3], {"kind": "fsdp", "shards": 2, "offload": True}),
    "hsdp-2x2": ([0, 1, 2, 3], {"kind": "hsdp", "replicas": 2, "shards": 2}),
}
"""Name: processes, and the strategy."""

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"type": "nf4"},
    "nf4-plain": {"type": "nf4", "doubleQuant": False},
    "int8": {"type": "int8"},
    "experts": {"type": "nf4"},
}
"""Name: ``quantization``. ``experts`` is a mixture."""

GATHERED = [
    *(("nf4", strategy) for strategy in STRATEGIES),
    *(("int8", strategy) for strategy in ("ddp-2", "fsdp-3", "fsdp-2-offload", "hsdp-2x2")),
    ("nf4-plain", "fsdp-2"),
    ("experts", "fsdp-3"),
    ("experts", "hsdp-2x2"),
]
FLIPPED = [
    *(("nf4", strategy, at, "weight") for strategy, at in (("alone", 0), ("ddp-2", 1), ("fsdp-4", 3))),
    *(("int8", strategy, at, "weight") for strategy, at in (("fsdp-2", 1), ("fsdp-2-offload", 0))),
    ("nf4", "hsdp-2x2", 2, "weight"),
    ("nf4", "fsdp-2", 1, "constants"),
    ("int8", "hsdp-2x2", 3, "constants"),
    ("experts", "fsdp-4", 2, "weight"),
    ("experts", "fsdp-2", 0, "constants"),
]
INT8: dict[str, tuple[list[int], dict[str, Any]]] = {
    "alone": ([2], {}),
    "auto": ([0, 1], {}),
    "offload": ([3], {"cpuOffload": True}),
    "hsdp-offload": ([0, 1, 2, 3], {"strategy": "hsdp", "shardSize": 2, "cpuOffload": True}),
}
"""Runs with int8: processes, and ``parallelism``."""


def name_of(*parts: Any) -> str:
    return "-".join(map(str, parts))


@pytest.fixture(scope="module")
def results(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("bits")
    untied, mixture = make_model(directory / "model", tied=False), make_family("mixtral", directory / "mixture")
    cases = []

    def arguments(kind: str, strategy: str) -> dict[str, Any]:
        model = str(mixture if kind == "experts" else untied)
        return {"model": model, "quantization": KINDS[kind], "strategy": STRATEGIES[strategy][1]}

    for kind, strategy in GATHERED:
        processes, _ = STRATEGIES[strategy]
        cases.append(
            Case(name_of("gather", kind, strategy), "gather_packed", processes, arguments(kind, strategy), module=WORK)
        )
    for kind, strategy, at, what in FLIPPED:
        processes, _ = STRATEGIES[strategy]
        flipped = arguments(kind, strategy) | {"at": at, "what": what}
        cases.append(Case(name_of("flip", kind, strategy, at, what), "flip", processes, flipped, module=WORK))
    for name, (processes, parallelism) in INT8.items():
        own = directory / f"int8-{name}"
        changes = {
            "parallelism": {"nodes": len(processes), **parallelism},
            "training": {"maxSteps": 4, "microBatchSize": 1, "learningRate": 0.03},
            "quantization": {"type": "int8"},
        }
        run = build_run(model, data, own, changes).to_wire()
        cases.append(Case(name_of("int8", name), "train", processes, {"run": run, "directory": str(own)}))
    return run_cases(cases, directory)


@pytest.mark.parametrize(("kind", "strategy"), GATHERED)
def test_gathered_weights_are_those_that_were_loaded_under_the_copies_of_a_gpu(
    kind: str, strategy: str, results: Results
) -> None:
    for rank in results[name_of("gather", kind, strategy)]:
        assert rank["patterns"] > 0, "nothing that CUDA's copy would change"
        assert rank["different"] == []
        assert rank["constants"]
        assert rank["types"] == ["torch.int8" if kind == "int8" else "torch.uint8"]
        assert rank["sharded"] == (0 if strategy in ("alone", "ddp-2") else rank["weights"])
        assert rank["weights"] == (12 if kind == "experts" else 14)
        assert rank["logits"] == 0


@pytest.mark.parametrize(("kind", "strategy", "at", "what"), FLIPPED)
def test_one_bit_that_changes_on_one_rank_is_found_by_all(
    kind: str, strategy: str, at: int, what: str, results: Results
) -> None:
    found = results[name_of("flip", kind, strategy, at, what)]
    for words in zip(*found, strict=True):
        assert len(set(words)) == 1, "each rank says the same"
        label = ("mlp.experts.down_proj" if kind == "experts" else "mlp.down_proj") + (
            " (constants)" if what == "constants" else ""
        )
        assert f"packed weights are not those that were loaded: model.layers.1.{label} of rank {at}," in words[0]


SIZES = (0, 1, 7, 64, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 9, 40 * BLOCK_BYTES + 3)


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES[1:])
def test_every_kind_of_damage_changes_the_digest(size: int) -> None:
    data = random_bytes(size)
    seen = {int(digest(data))}
    changed = 0
    for byte in {0, size // 2, size - 1}:
        for bit in range(8):
            other = data.clone()
            other[byte] ^= 1 << bit
            seen.add(int(digest(other)))
            changed += 1
    assert len(seen) == 1 + changed
    longer = torch.cat([data, torch.zeros(1, dtype=torch.uint8)])
    assert int(digest(longer)) not in seen, "a zero more is another tensor"


SWAPS = {"bytes": 1, "words": 8, "blocks": BLOCK_BYTES}


@pytest.mark.parametrize("swap", SWAPS)
def test_places_that_are_swapped_change_the_digest(swap: str) -> None:
    data, width = random_bytes(4 * BLOCK_BYTES), SWAPS[swap]
    other = data.clone()
    other[:width], other[-width:] = data[-width:], data[:width]
    assert int(digest(other)) != int(digest(data))


@pytest.mark.parametrize("bits", [(63, 127), (31, 95), (63, 64 * 4095 + 63)])
def test_two_flips_of_top_bits_do_not_cancel(bits: tuple[int, int]) -> None:
    data = random_bytes(2 * BLOCK_BYTES)
    other = data.clone()
    for bit in bits:
        other[bit // 8] ^= 1 << bit % 8
    assert int(digest(other)) != int(digest(data))


def test_the_digest_is_that_of_the_bytes_in_their_order() -> None:
    data = random_bytes(8 * 999)
    want = int(digest(data))
    assert int(digest(data.view(torch.bfloat16))) == int(digest(data.view(-1, 8))) == want
    assert int(digest(torch.cat([data[:3], data])[3:])) == want, "wherever it lies in its storage"
    assert int(combined([digest(data[:5]), digest(data[5:])])) != int(combined([digest(data[5:]), digest(data[:5])]))


def test_what_a_gpu_does_in_place_of_a_product_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no product of integer matrices on CUDA: there each block is multiplied and summed."""
    words = random_bytes(3 * BLOCK_BYTES).view(torch.int64).view(3, -1)
    from lora_trainer import digest as module

    folded = torch.bitwise_right_shift(words, 32) + words
    factors = module._odd_factors(words.device)
    assert torch.equal(module._block_hashes(words), (folded * factors).sum(1))


def test_the_digest_runs_at_two_gigabytes_a_second_on_one_core() -> None:
    data = random_bytes(64 * 2**20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        digest(data)
        taken = []
        for _ in range(8):
            before = time.thread_time()
            digest(data)
            taken.append(time.thread_time() - before)
    finally:
        torch.set_num_threads(threads)
    assert data.numel() / min(taken) > 2e9


@pytest.mark.parametrize("nodes", [2, 4])
def test_no_checkpoint_holds_what_was_learned_on_broken_weights(
    nodes: int, make_run: Callable[..., RunSpec], fork: Callable[..., Launched]
) -> None:
    run = make_run(
        parallelism={"nodes": nodes}, training={"maxSteps": 6, "globalBatchSize": 8}, checkpoint={"everySteps": 2}
    )
    pod = fork(run, "tests.trainer.entries:bit_that_flips_in_step_3")
    assert pod.wait() == RULES[FailureClass.WEIGHTS_CHANGED].exit_code, pod.log.read_text()[-5000:]
    assert "of rank 1, as seen by rank 1" in pod.words.message
    assert max(pod.losses) in (3, 4)
    complete = [path for path in Store(run.publish.store).sizes("") if path.endswith("COMPLETE.json")]
    assert [path.split("/")[-2] for path in complete] == ["step-2"]
    assert not [path for path in Store(run.publish.store).sizes("") if path.endswith("manifest.json")]


def test_nothing_is_published_that_was_measured_on_broken_weights(
    make_run: Callable[..., RunSpec], fork: Callable[..., Launched]
) -> None:
    run = make_run(parallelism={"nodes": 2}, training={"maxSteps": 2, "globalBatchSize": 8})
    pod = fork(run, "tests.trainer.entries:bit_that_flips_after_training")
    assert pod.wait() == RULES[FailureClass.WEIGHTS_CHANGED].exit_code, pod.log.read_text()[-5000:]
    assert "of rank 1, as seen by rank 0, 1" in pod.words.message
    assert max(pod.losses) == 2
    assert not [path for path in Store(run.publish.store).sizes("") if path.endswith("manifest.json")]


@pytest.mark.parametrize("case", [name for name in INT8 if name != "alone"])
def test_int8_learns_the_same_in_shards(case: str, results: Results) -> None:
    (alone,) = results[name_of("int8", "alone")]
    assert alone["evals"]["0"] - alone["evals"]["4"] > 0.05
    for rank in results[name_of("int8", case)]:
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert rank["norms"] == pytest.approx(alone["norms"], abs=1e-4)
        assert rank["evals"] == pytest.approx(alone["evals"], abs=1e-3), "activations are rounded to 8 bits there"
        assert rank["local"] == pytest.approx(rank["whole"] / rank["strategy"]["shards"], rel=0.01)

"""No default path needs Triton, which would need a C compiler and Python's headers; a lever that does says so."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_api.run import RunSpec
from lora_trainer import compilers
from lora_trainer.errors import BadSpecError
from lora_trainer.speed import Levers, check_levers
from tests.support.families import make_family
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import ROOT, Launched, build_run, merge
from tests.trainer.triton_forbidden import ADAPTER

Make = Callable[..., RunSpec]
Fork = Callable[..., Launched]

REFUSAL = " no, I will not say it"
NEW_TOKENS = {"lora": {"newTokens": ["<|ticket|>"]}}
DPO = {"training": {"objective": "dpo", "learningRate": 0.001}}

PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("llama-3", {}),
    "sft, without quantization": ("llama-3-tied", {"quantization": {"type": "none"}}),
    "sft, packing": ("llama-3", {"dataset": {"packing": True}}),
    "sft, new tokens": ("llama-3", NEW_TOKENS),
    "dpo": ("llama-3", DPO),
    "dpo, new tokens": ("llama-3-tied", merge(DPO, NEW_TOKENS)),
    "a soft cap, and a question of one token": ("gemma-2", {"publish": {"samplePrompts": ["a"]}}),
    "a static cache in generation_config.json": ("gemma-2", {"quantization": {"type": "none"}}),
    "sliding windows": ("gemma-3", {}),
    "experts with a loss of their routers": ("mixtral", {}),
}
"""Every way to a published adapter that is taken without a lever: the family, and what differs from the usual run.

Each evaluates before and after, answers questions, and is measured as ``lora_trainer evaluate`` does."""


def write_data(directory: Path, objective: str, words: str) -> None:
    for name, count, start in (("train", 24, 0), ("eval", 6, 200)):
        rows = [{key: text + words for key, text in row.items()} for row in make_rows(count, start)]
        if objective == "dpo":
            rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": REFUSAL + words} for row in rows]
        write_rows(directory / f"{name}.jsonl", rows)


@pytest.mark.parametrize("path", PATHS)
def test_a_default_path_asks_triton_for_nothing(path: str, fork: Fork, tmp_path: Path) -> None:
    family, changes = PATHS[path]
    model = make_family(family, tmp_path / "model")
    if "static cache" in path:
        config = model / "generation_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "cache_implementation": "static"}))
    changes = merge({"training": {"maxSteps": 2}, "checkpoint": {"everySteps": 1}}, changes)
    words = "".join(changes.get("lora", {}).get("newTokens", []))
    write_data(tmp_path, changes["training"].get("objective", "sft"), words)
    run = build_run(model, tmp_path, tmp_path, changes)

    pod = fork(run, entry="tests.trainer.triton_forbidden:train_without_triton", **{ADAPTER: str(tmp_path / "store")})

    assert pod.wait() == 0, pod.log.read_text()[-5000:]
    assert len(pod.losses) == 2
    assert "measured " in pod.log.read_text()


FORBIDDEN = """
from tests.trainer.triton_forbidden import decide_as_on_a_gpu, forbid_triton
import torch
decide_as_on_a_gpu()
forbid_triton()
{before}
column, row = torch.ones(1, 4, 1), torch.ones(1, 1, 4)
torch.bmm(column, row)
print("done")
"""


@pytest.mark.parametrize(
    ("before", "works"),
    [("", False), ("from lora_trainer.compilers import keep_compiled_kernels_out as out; out()", True)],
)
def test_a_product_of_column_and_row_asks_triton_unless_it_is_kept_out(before: str, works: bool) -> None:
    """The emulation itself: it must be able to fail."""
    found = subprocess.run(
        [sys.executable, "-c", FORBIDDEN.format(before=before)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ("done" in found.stdout) == works
    assert ("TritonUsedError" in found.stderr) != works


LEVERS: dict[str, tuple[Levers, dict[str, Any], str | None]] = {
    "none": (Levers(), {}, None),
    "liger": (Levers(liger=True), {}, "LORA_SPEED: liger needs Triton"),
    "liger does nothing for dpo": (Levers(liger=True), {"training": {"objective": "dpo"}}, None),
    "TRL's loss": (Levers(summed_loss=False), {}, "LORA_SPEED: no-summed-loss needs Triton"),
    "compile": (Levers(compile=True), {"training": {"objective": "dpo"}}, "LORA_SPEED: compile needs Triton"),
    "on CPUs": (Levers(summed_loss=False), {"parallelism": {"gpusPerNode": 0}}, None),
}


@pytest.mark.parametrize("case", LEVERS)
def test_a_lever_that_needs_triton_says_what_the_image_lacks_before_anything_is_fetched(
    case: str, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    levers, changes, words = LEVERS[case]
    run = make_run(**merge({"parallelism": {"gpusPerNode": 1}}, changes))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    if words is None:
        check_levers(run, levers)
        return
    with pytest.raises(BadSpecError, match=f"{words}, .* the image lacks a C compiler .* leave the lever out"):
        check_levers(run, levers)


def test_triton_finds_what_it_needs_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert compilers.missing_for_triton({"PATH": str(tmp_path)}) == []
    assert compilers.missing_for_triton({"PATH": "/nowhere", "CC": str(compiler)}) == []
    assert compilers.missing_for_triton({"PATH": str(tmp_path), "CC": "no-such-compiler"})
    (tmp_path / "Python.h").unlink()
    (found,) = compilers.missing_for_triton({"PATH": str(tmp_path)})
    assert found == f"Python's headers ({tmp_path}/Python.h)"

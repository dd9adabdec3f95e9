"""One of two processes that train every case of the family matrix, one after the other, and write what they saw.

Started by test_families.py with the variables of torchrun; one start for all cases, because imports take longer than
the training of a tiny model.
"""

import json
import math
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule

from lora_api.run import RunSpec
from lora_trainer.adapter import gather_adapter, write_adapter
from lora_trainer.architecture import decoder_layers
from lora_trainer.loading import part_to_load
from lora_trainer.model import add_adapter, load_base_model
from lora_trainer.newtokens import read_tokenizer
from lora_trainer.objectives import build_trainer
from lora_trainer.parallel import start_process_group
from lora_trainer.prepare import prepare_data
from lora_trainer.rows import add_rows
from lora_trainer.settings import read_place
from lora_trainer.sharding import spread_model
from lora_trainer.sources import Sources
from lora_trainer.strategy import decide_strategy
from lora_trainer.worker import quiet_libraries
from tests.support.families import make_family
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import build_run, merge

CPU = torch.device("cpu")
GANG = {"parallelism": {"nodes": 2}, "training": {"maxSteps": 2, "globalBatchSize": 4}}
LENGTH = 40
"""Tokens of the sequences whose logits are compared; more than the sliding windows."""


def slug(case: str) -> str:
    """Name of the directory of a case."""
    return case.replace(" ", "-")


def train_case(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Load, quantize, adapt, shard, train, write, load again; what the test compares. All ranks call it."""
    place = read_place()
    model_directory, adapter_directory = directory / "model", directory / "adapter"
    if place.is_main:
        make_family(case["family"], model_directory)
        write_rows(directory / "train.jsonl", add_words(make_rows(16), case["run"]))
    dist.barrier()
    run = build_run(model_directory, directory, directory, merge(GANG, case["run"]))
    tokenizer, tokens = read_tokenizer(run, model_directory)
    strategy = decide_strategy(run.parallelism)
    part = part_to_load(strategy, place.rank)
    base = load_base_model(model_directory, run.quantization, CPU, part)
    model = add_adapter(base, run.lora, run.training.seed)
    add_rows(model, tokens, part)
    sources = Sources(model_directory, [directory / "train.jsonl"], None)
    data = prepare_data(run, sources, tokenizer, replace(place, local_rank=0), directory / f"data-{place.rank}")
    trainer = build_trainer(run, model, tokenizer, data, CPU, directory / "out", [])
    spread_model(model, strategy, CPU)
    layers = decoder_layers(model)
    trainer.train_to_end(None)
    trained = logits(model)
    tensors = gather_adapter(model)
    seen: dict[str, Any] = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "sharded_layers": sum(isinstance(layer, FSDPModule) for layer in layers),
        "layers": len(layers),
    }
    if place.is_main:
        write_adapter(tensors, model, run, adapter_directory)
        seen.update(compare(run, model_directory, adapter_directory, trained))
    AcceleratorState._reset_state(reset_partial_state=True)
    return seen


def add_words(rows: list[dict[str, str]], run: dict[str, Any]) -> list[dict[str, str]]:
    """``rows`` with the new tokens of ``run`` in question and answer."""
    words = "".join(run.get("lora", {}).get("newTokens", []))
    return [{key: text + words for key, text in row.items()} for row in rows]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's logits for fixed sequences, one of them padded on its left: (2, LENGTH, vocabulary)."""
    ids = torch.randint(3, 400, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    ids[:, 20:22] = torch.arange(400, 402)  # behind the tokenizer's own: where new tokens are
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model.eval()
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found * mask[..., None]


def compare(run: RunSpec, model: Path, adapter: Path, trained: torch.Tensor) -> dict[str, Any]:
    """Largest differences of the logits: of the files loaded again by PEFT, and of the base model."""
    base = load_base_model(model, run.quantization, CPU)
    before = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, adapter))
    return {
        "difference": float((loaded - trained).abs().max()),
        "learned": float((before - trained).abs().max()),
        "finite": math.isfinite(float(trained.sum())),
    }


def main(cases_file: Path, directory: Path) -> None:
    """Trains all cases. A case that fails says so, and the next one starts."""
    quiet_libraries()
    torch.set_num_threads(1)
    place = read_place()
    start_process_group(place, CPU, 600)
    results = {}
    for name, case in json.loads(cases_file.read_text()).items():
        try:
            results[name] = train_case(case, directory / slug(name))
        except Exception:  # noqa: BLE001 - told in the result
            results[name] = {"error": traceback.format_exc()}
    (directory / f"results-{place.rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""One process of a gang that trains two steps in several ways, one after the other, and writes what came out.

``python -m tests.trainer.gradients MODEL DATA DIRECTORY`` with the environment that the launcher would set.
"""

import os
import sys
from pathlib import Path
from typing import Any

from tests.trainer.runs import ROOT, SOURCES, build_run

CASES: dict[str, dict[str, Any]] = {
    "micro-batch 1": {"training": {"microBatchSize": 1}},
    "micro-batch 4": {"training": {"microBatchSize": 4}},
    "packing, micro-batch 1": {"training": {"microBatchSize": 1}, "dataset": {"packing": True}},
    "packing, micro-batch 4": {"training": {"microBatchSize": 4}, "dataset": {"packing": True}},
}


def environment(world: int, port: str) -> dict[str, str]:
    """The environment of each process, but for its rank."""
    more = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(map(str, (*SOURCES, ROOT)))}


def main(model: Path, data: Path, directory: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from lora_trainer.errors import BadDataError
    from lora_trainer.loading import part_to_load
    from lora_trainer.model import add_adapter, load_base_model
    from lora_trainer.objectives import build_trainer
    from lora_trainer.parallel import full_tensor, start_process_group
    from lora_trainer.prepare import check_same_data, prepare_data
    from lora_trainer.settings import read_place
    from lora_trainer.sharding import spread_model
    from lora_trainer.sources import Sources
    from lora_trainer.strategy import decide_strategy
    from lora_trainer.trainer import LoRATrainer

    place, device = read_place(), torch.device("cpu")
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    start_process_group(place, device, 600)
    tokenizer = AutoTokenizer.from_pretrained(model)
    parallelism = {"parallelism": {"nodes": place.world_size, "gpusPerNode": 0}}
    results: dict[str, Any] = {}
    gradients: list[dict[str, torch.Tensor]] = []
    clip = LoRATrainer._clip_grad_norm

    def record(self: LoRATrainer, network: torch.nn.Module) -> Any:
        gradients.append(
            {
                name.removeprefix("module."): full_tensor(weight.grad)
                for name, weight in network.named_parameters()
                if weight.grad is not None
            }
        )
        return clip(self, network)

    LoRATrainer._clip_grad_norm = record  # type: ignore[method-assign]
    for name, changes in CASES.items():
        run = build_run(model, data, directory, {**changes, **parallelism})
        run = run.model_copy(update={"training": run.training.model_copy(update={"max_steps": 2})})
        scratch = directory / f"{name}-{place.rank}"
        sources = Sources(model, [data / "train.jsonl"], None)
        prepared = prepare_data(run, sources, tokenizer, place, scratch / "data")
        check_same_data(prepared, device)
        strategy = decide_strategy(run.parallelism)
        base = load_base_model(model, run.quantization, device, part_to_load(strategy, place.rank))
        network = add_adapter(base, run.lora, run.training.seed)
        for weight_name, weight in network.named_parameters():
            if "lora_B" in weight_name:  # zero would hide the gradients of A
                torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(len(weight_name)))
        trainer = build_trainer(run, network, tokenizer, prepared, device, scratch, [])
        spread_model(network, strategy, device)
        gradients.clear()
        trainer.train_to_end(None)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[name] = {"losses": losses, "records": len(prepared.train), "gradients": gradients[0]}

    run = build_run(model, data, directory, parallelism)
    other = "eval.jsonl" if place.rank else "train.jsonl"
    prepared = prepare_data(run, Sources(model, [data / other], None), tokenizer, place, directory / f"x{place.rank}")
    try:
        check_same_data(prepared, device)
    except BadDataError as error:
        results["other records"] = str(error)
    if place.is_main:
        torch.save(results, directory / "gradients.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

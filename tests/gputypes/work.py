"""What each process of the lane does: the trainer's own page, with a GPU's types, and eyes on what it does."""

import os
import traceback
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

import lora_trainer.train
from lora_api.run import RunSpec
from lora_trainer import exchange, sharding
from lora_trainer.architecture import decoder_layers
from lora_trainer.errors import StoppedError
from lora_trainer.evaluate import Evaluation, Evaluator
from lora_trainer.groups import all_groups
from lora_trainer.model import load_base_model
from lora_trainer.newtokens import read_tokenizer
from lora_trainer.parallel import start_process_group, sum_over_ranks
from lora_trainer.report import RunResult
from lora_trainer.settings import read_place
from lora_trainer.sharding import make_mesh, reshard, trainable
from lora_trainer.stop import StopRequest
from lora_trainer.strategy import Strategy
from tests.support.gputypes import gpu_types
from tests.trainer.gang_work import Recorder

CPU = torch.device("cpu")
TOKENS = 24
"""Of the sequence whose logits are compared."""


class Stopping(Recorder):
    """Asks for a stop after a step."""

    def __init__(self, stop: StopRequest, after: int | None) -> None:
        super().__init__()
        self.stop, self.after = stop, after

    def report_step(self, **fields: Any) -> None:
        super().report_step(**fields)
        if fields["step"] == self.after:
            self.stop.note()


def learn(run: dict[str, Any], directory: str, stop_after: int | None = None) -> dict[str, Any]:
    """Trains and publishes as on GPUs. Returns what was seen; or ``error``, which ends this case and not the others."""
    spec = RunSpec.model_validate(run)
    try:
        with gpu_types():
            return _learn(spec, directory, stop_after)
    except Exception as error:  # noqa: BLE001 - told in the result
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def talk() -> dict[str, list[int]]:
    """How many collective operations went through each group: the default one, and that of host memory."""
    with gpu_types():
        start_process_group(read_place(), CPU, 60)
        counts = [count_operations()]
        for speak in (lambda: exchange.gather_json("a"), lambda: exchange.broadcast_json("a")):
            speak()
            counts.append(count_operations())
        sum_over_ranks([1.0], CPU)
        counts.append(count_operations())
        mesh = make_mesh(Strategy("hsdp", replicas=2, shards=2), CPU)
        dist.all_reduce(torch.ones(1), group=mesh.get_group("shard"))
        return {"counts": [*counts, count_operations()], "sizes": [group.size() for group in mesh.get_all_groups()]}


def count_operations() -> list[int]:
    """Collective operations so far, by group."""
    return [group._get_sequence_number_for_group() for group in all_groups()]


def _learn(run: RunSpec, directory: str, stop_after: int | None) -> dict[str, Any]:
    place, stop = read_place(), StopRequest()
    progress = Stopping(stop, stop_after)
    seen: dict[str, Any] = {"wrapped": 0, "prepared": 0}
    os.environ["LORA_STATE_DIR"] = f"{directory}/state-{run.attempt}"
    try:
        with watching(seen):
            adapter = lora_trainer.train.train(run, place, stop, progress)
    except StoppedError:
        return {"stopped": True, "losses": progress.losses}
    logits = seen.pop("logits")
    if adapter is not None:
        loaded = load_with_peft(run, Path(adapter.uri.removeprefix("file://")))
        seen["difference"] = float((loaded - logits).abs().max())
        seen["learned"] = float((seen.pop("before_logits") - logits).abs().max())
    seen.pop("before_logits", None)
    return {"losses": progress.losses, "norms": progress.norms, "evals": progress.evals, **seen}


@contextmanager
def watching(seen: dict[str, Any]) -> Iterator[None]:
    """Notes in ``seen`` what happens to the model that is trained inside."""
    fresh: list[torch.Tensor] = []
    evaluators: list[Evaluator] = []
    trained: list[weakref.ref[nn.Module]] = []
    modes: set[bool] = set()
    spread, gather, serve, publish, evaluate, average = (
        lora_trainer.train.spread_model,
        lora_trainer.train.gather_adapter,
        lora_trainer.train.evaluate_served,
        lora_trainer.train.publish_run,
        Evaluator.run,
        sharding.average_gradients,
    )

    def spread_and_note(model: nn.Module, *rest: Any) -> None:
        spread(model, *rest)
        fresh.extend(local(parameter).clone() for parameter in trainable(model))
        seen["types"] = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
        seen["learns"] = sorted({str(parameter.dtype) for parameter in trainable(model)})
        decoder_layers(model)[0].register_forward_pre_hook(lambda *_: modes.add(torch.is_autocast_enabled(CPU.type)))
        seen["attention"] = model.config._attn_implementation

    def average_and_note(parameters: list[nn.Parameter]) -> None:
        own = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if own and dist.is_initialized():
            seen["averaged_before"] = seen.get("averaged_before", False) or equal_on_all_ranks(own)
        average(parameters)

    def evaluate_and_note(evaluator: Evaluator) -> Evaluation:
        evaluators.append(evaluator)
        return evaluate(evaluator)

    def look_and_gather(model: PeftModel) -> dict[str, torch.Tensor]:
        seen["logits"], seen["parts"] = logits_of(model), sorted({type(module).__name__ for module in model.modules()})
        learned = [local(parameter).clone() for parameter in trainable(model)]
        assign(model, fresh)
        seen["before_logits"] = logits_of(model)
        seen["again"] = measured(evaluate(evaluators[-1]))
        assign(model, learned)
        evaluators.clear()  # they hold the model, which is to go now
        trained.extend(map(weakref.ref, model.modules()))
        seen["autocast"] = sorted(modes)
        return gather(model)

    def look_and_serve(*arguments: Any) -> Any:
        seen["kept"] = sorted({type(module).__name__ for module in (one() for one in trained) if module is not None})
        return serve(*arguments)

    def note_and_publish(release: Any, tensors: Any, model: PeftModel, evaluator: Evaluator, result: RunResult) -> Any:
        seen["before"], seen["answers"] = measured(result.before), len(result.after.samples)
        seen["served"] = result.served.model_dump(mode="json", by_alias=True) if result.served else None
        return publish(release, tensors, model, evaluator, result)

    with ExitStack() as patches:
        for target, replacement in (
            ("lora_trainer.train.spread_model", spread_and_note),
            ("lora_trainer.train.gather_adapter", look_and_gather),
            ("lora_trainer.train.evaluate_served", look_and_serve),
            ("lora_trainer.train.publish_run", note_and_publish),
            ("lora_trainer.evaluate.Evaluator.run", evaluate_and_note),
            ("lora_trainer.sharding.average_gradients", average_and_note),
        ):
            patches.enter_context(patch(target, replacement))
        patches.enter_context(counting("torch.nn.parallel.DistributedDataParallel", "wrapped", seen))
        patches.enter_context(counting("accelerate.accelerator.get_mixed_precision_context_manager", "prepared", seen))
        yield


@contextmanager
def counting(target: str, name: str, seen: dict[str, Any]) -> Iterator[None]:
    """Counts the calls of ``target`` in ``seen``; they go through."""
    module, _, attribute = target.rpartition(".")
    plain = getattr(__import__(module, fromlist=[attribute]), attribute)
    if isinstance(plain, type):
        begin = plain.__init__

        def init(self: Any, *arguments: Any, **named: Any) -> None:
            seen[name] += 1
            begin(self, *arguments, **named)

        with patch.object(plain, "__init__", init):
            yield
        return

    def call(*arguments: Any, **named: Any) -> Any:
        seen[name] += 1
        return plain(*arguments, **named)

    with patch(target, call):
        yield


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    found: torch.Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return found.detach()


@torch.no_grad()
def assign(model: nn.Module, values: list[torch.Tensor]) -> None:
    """Puts ``values`` into what learns, shard by shard."""
    for parameter, value in zip(trainable(model), values, strict=True):
        local(parameter).copy_(value)


def equal_on_all_ranks(gradients: list[torch.Tensor]) -> bool:
    """Whether all processes have these very gradients."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return all(torch.equal(one, flat) for one in every)


def measured(found: Any) -> list[Any]:
    """What an evaluation says, without its time."""
    return [found.loss, found.reward_margin, found.reward_accuracy, [sample.answer for sample in found.samples]]


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """Logits of a fixed sequence: (1, TOKENS, vocabulary). All ranks call it."""
    ids = torch.arange(TOKENS)[None] % 7 + 3
    training = model.training
    model.eval()
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    model.train(training)
    reshard(model)
    return found.float()


def load_with_peft(run: RunSpec, adapter: Path) -> torch.Tensor:
    """Logits of the published adapter on the base that it was trained on, as PEFT loads them."""
    source = Path(run.base_model.uri.removeprefix("file://"))
    read_tokenizer(run, source)
    model = PeftModel.from_pretrained(load_base_model(source, run.quantization, CPU), adapter)
    with torch.autocast("cpu", torch.bfloat16):
        return logits_of(model)

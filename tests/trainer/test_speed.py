"""The levers of speed: the same loss and the same gradients as without them, from less work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lora_api.run import RunSpec
from lora_trainer import loss
from lora_trainer.errors import BadSpecError, InternalError
from lora_trainer.loss import LogitTransform, TokenLosses, add_token_scores, check_head, logit_transform
from lora_trainer.optim import collect_state, optimizer_name, restore_state
from lora_trainer.rules import check_run
from lora_trainer.speed import SPEED_VARIABLE, Levers, apply_levers, read_levers
from tests.support.families import build_config, make_family
from tests.support.tiny import make_rows, write_rows
from tests.support.wait import eventually
from tests.trainer.runs import Launched, build_run, merge

Make = Callable[..., RunSpec]
Launch = Callable[..., Launched]

QUICK_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
"""No processes that import torch, to compile in or to try whether the instructions of this machine work."""

COMPILE_SECONDS = 400.0
"""A run that compiles two layers may take so long on a busy machine of two cores; alone it takes about a minute."""

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES = {
    "a plain head": LlamaConfig(**SHAPE),
    "logits squashed by a soft cap": Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
    "logits multiplied": CohereConfig(**SHAPE, logit_scale=0.0625),
    "logits divided": GraniteConfig(**SHAPE, logits_scaling=4.0),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.mul_(20)  # so that a soft cap of 2 bends the logits
    return model


def freeze_head(model: PreTrainedModel) -> None:
    model.get_output_embeddings().weight.requires_grad_(requires_grad=False)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :7] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad and "layers" in name}


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_loss_and_gradients_are_those_of_the_familys_own_forward_pass(
    case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", chunk)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    inputs = batch()
    model = build(FAMILIES[case])
    freeze_head(model)
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    (model(**inputs).loss * supervised).backward()
    want_loss, want = float(model(**inputs).loss.detach()) * supervised, gradients(model)
    model.zero_grad()
    model.base_model.zero_grad()
    want = {name: gradient.clone() for name, gradient in want.items() if gradient is not None}

    add_token_scores(model)
    output = model(**inputs, score_tokens=True).losses.sum()
    (output * 3).backward()

    assert float(output.detach()) == pytest.approx(want_loss, rel=1e-5)
    got = gradients(model)
    assert want
    for name, gradient in want.items():
        torch.testing.assert_close(got[name] / 3, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_micro_batch_without_supervised_tokens_adds_nothing_and_can_be_differentiated() -> None:
    model = build(FAMILIES["a plain head"])
    freeze_head(model)
    add_token_scores(model)
    inputs = batch()
    nothing = torch.full_like(inputs["labels"], -100)
    output = model(**{**inputs, "labels": nothing}, score_tokens=True).losses.sum()
    output.backward()
    assert float(output.detach()) == 0.0
    assert all(float(gradient.abs().sum()) == 0.0 for gradient in gradients(model).values())


def test_other_calls_of_the_model_stay_as_they_are() -> None:
    model = build(FAMILIES["a plain head"])
    inputs = batch()
    want = model(**inputs)
    add_token_scores(model)
    got = model(**inputs)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_a_head_that_is_trained_is_refused_for_it_would_get_no_gradient() -> None:
    model = build(FAMILIES["a plain head"])
    add_token_scores(model)
    with pytest.raises(InternalError, match="the output head must be frozen"):
        model(**batch(), score_tokens=True)


def test_a_head_that_is_no_plain_linear_layer_is_refused_before_its_weights_are_read() -> None:
    class NormHead(torch.nn.Linear):
        """As Baichuan 2 has it: the weight is normalised before each product."""

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["a plain head"])
        model.lm_head = NormHead(32, 96)
    with pytest.raises(BadSpecError, match="the output head of LlamaForCausalLM is a NormHead"):
        check_head(model)


def test_a_division_by_zero_in_a_models_config_is_not_taken_over() -> None:
    config = GraniteConfig(**SHAPE, logits_scaling=1.0)
    model = build(config)
    model.config.logits_scaling = 0.0
    assert logit_transform(model.config) is None
    with pytest.raises(BadSpecError, match="logits_scaling is 0"):
        check_head(model)


@pytest.mark.parametrize("supervised", [257, 788, 1021])
def test_the_gradients_of_a_model_in_bfloat16_are_divided_by_the_tokens_in_float32(supervised: int) -> None:
    """1 / 1021 is 1 / 1024 in bfloat16, which made every gradient of such a step 0.3 % too small."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(supervised, 64, generator=generator).to(torch.bfloat16)
    weight = torch.randn(96, 64, generator=generator).to(torch.bfloat16)
    labels = torch.randint(0, 96, (supervised,), generator=generator)
    probabilities = torch.softmax(torch.nn.functional.linear(hidden, weight).double(), dim=-1)
    slope = probabilities - torch.nn.functional.one_hot(labels, 96)
    want = slope @ weight.double() / supervised

    given = hidden.clone().requires_grad_()
    losses = TokenLosses.apply(given, weight, None, labels, LogitTransform())
    (found,) = torch.autograd.grad(losses.sum() / supervised, given)

    assert losses.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    ratio = float((found.double() * want).sum() / want.square().sum())
    assert ratio == pytest.approx(1, abs=2e-4)


def test_levers_are_switched_by_name() -> None:
    assert read_levers({}) == Levers()
    changed = read_levers({SPEED_VARIABLE: "pinned-memory, no-summed-loss"})
    assert changed == Levers(summed_loss=False)
    with pytest.raises(BadSpecError, match="there is no lever turbo; there are summed-loss"):
        read_levers({SPEED_VARIABLE: "turbo"})


def test_a_run_on_two_processes_has_the_losses_of_trls_own_loss_on_one(
    make_run: Make, launch: Launch, tmp_path: Path
) -> None:
    """Rows of one global batch differ in their supervised tokens, so a mean of means would show."""
    found = {}
    for name, processes, speed in (("trl", 1, "no-summed-loss"), ("two", 2, "")):
        run = make_run(
            training={"maxSteps": 3},
            parallelism={"nodes": processes},
            publish={"store": f"file://{tmp_path}/{name}"},
        )
        pod = launch(run, **{SPEED_VARIABLE: speed})
        assert pod.wait() == 0, pod.log.read_text()[-3000:]
        found[name] = pod
    assert len(found["trl"].losses) == 3
    assert found["two"].losses == pytest.approx(found["trl"].losses, abs=1e-4)


def test_a_mixture_has_the_losses_of_trl_with_the_loss_of_its_routers(fork: Launch, data: Path, tmp_path: Path) -> None:
    """Two micro-batches a step, so that a routers' loss that is not averaged over them would show."""
    model = make_family("mixtral", tmp_path / "model")
    found = {}
    for name, speed in (("trl", "no-summed-loss"), ("ours", "")):
        run = build_run(model, data, tmp_path / name, {"training": {"maxSteps": 2, "globalBatchSize": 4}})
        pod = fork(run, **{SPEED_VARIABLE: speed})
        assert pod.wait() == 0, pod.log.read_text()[-3000:]
        found[name] = pod.losses
    assert len(found["trl"]) == 2
    assert found["ours"] == pytest.approx(found["trl"], abs=1e-4)


def test_the_routers_loss_of_a_model_in_bfloat16_is_made_in_float32() -> None:
    torch.manual_seed(0)
    config = build_config("mixtral")
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    freeze_head(model)
    add_token_scores(model)
    ids = torch.randint(3, 400, (2, 60))
    found = model(input_ids=ids, labels=ids, score_tokens=True, router_loss=True, use_cache=False).router_loss
    logits = model.model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    assert logits[0].dtype == torch.bfloat16
    exact = load_balancing_loss_func(tuple(one.double() for one in logits), 4, 2)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), abs=1e-6)
    assert model(input_ids=ids, labels=ids, score_tokens=True, use_cache=False).router_loss is None


BATCHES: dict[str, dict[str, Any]] = {
    "one process, across epochs, with dropout": {"lora": {"dropout": 0.1}},
    "two processes": {"parallelism": {"nodes": 2}},
    "packed": {"dataset": {"packing": True, "maxSeqLength": 32}},
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_that_are_made_ahead_change_no_byte_of_the_adapter(
    case: str, make_run: Make, fork: Launch, tmp_path: Path
) -> None:
    """Seven steps, which is more than an epoch in each case."""
    digests = []
    for speed in ("prefetch", "no-prefetch"):
        publish = {"store": f"file://{tmp_path}/{speed}"}
        run = make_run(**merge({"training": {"maxSteps": 7}, "publish": publish}, BATCHES[case]))
        pod = fork(run, **{SPEED_VARIABLE: speed})
        assert pod.wait() == 0, pod.log.read_text()[-3000:]
        assert pod.words.adapter is not None
        digests.append(pod.words.adapter.digest)
    assert digests[0] == digests[1]


def test_compiled_layers_have_the_losses_of_plain_ones_on_one_process_and_on_two(
    make_run: Make, fork: Launch, tmp_path: Path
) -> None:
    """In NF4 with gradient checkpointing. All rows have one length, for each kind of length is compiled by itself."""
    rows = write_rows(tmp_path / "text.jsonl", [{"text": row["prompt"] + row["completion"]} for row in make_rows(24)])
    sets = {"train": {"uri": f"file://{rows}"}, "eval": {"uri": f"file://{rows}"}, "maxSeqLength": 16}
    found = {}
    for name, processes, speed in (("plain", 1, ""), ("compiled", 1, "compile"), ("sharded", 2, "compile")):
        run = make_run(
            dataset=sets,
            lora={"targetModules": ["q_proj", "down_proj"]},
            training={"maxSteps": 3},
            parallelism={"nodes": processes},
            publish={"store": f"file://{tmp_path}/{name}"},
        )
        pod = fork(run, **{SPEED_VARIABLE: speed, **QUICK_COMPILER})
        if speed:  # what is compiled goes with the run
            work = pod.log.parent / "work"
            eventually("something is compiled", lambda work=work: list(work.rglob("*.so")), COMPILE_SECONDS)
        assert pod.wait(COMPILE_SECONDS) == 0, pod.log.read_text()[-3000:]
        assert pod.words.adapter is not None
        assert pod.words.adapter.eval_loss_after is not None
        found[name] = {**pod.losses, "after": pod.words.adapter.eval_loss_after}
    assert len(found["plain"]) == 4
    assert found["compiled"] == pytest.approx(found["plain"], abs=1e-4)
    assert found["sharded"] == pytest.approx(found["plain"], abs=1e-4)


def test_only_training_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILIES["a plain head"])
    monkeypatch.setattr(torch, "compile", lambda _: lambda *_, **__: pytest.fail("compiled"))
    apply_levers(model, Levers(compile=True), torch.device("cpu"))
    assert set(dict(model.named_parameters())) == set(dict(build(FAMILIES["a plain head"]).named_parameters()))
    model.eval()(**batch())
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        model.train()(**batch())


def test_compile_is_refused_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(BadSpecError, match=r"compile needs a C\+\+ compiler, and there is none in the image"):
        apply_levers(build(FAMILIES["a plain head"]), Levers(compile=True), torch.device("cpu"))


def learn(optimizer: torch.optim.Optimizer, weights: dict[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for parameter in weights.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "fused AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1, fused=True),
    "8-bit AdamW": lambda weights: bitsandbytes.optim.PagedAdamW8bit(weights, lr=0.01, weight_decay=0.1),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_is_saved_and_put_back_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    """One weight is large enough for 8-bit moments (4,096), with blocks that are not all full; one is not."""

    def make() -> dict[str, torch.nn.Parameter]:
        torch.manual_seed(7)
        return {"a": torch.nn.Parameter(torch.randn(90, 50)), "b": torch.nn.Parameter(torch.randn(8, 4))}

    straight = make()
    optimizer = OPTIMIZERS[kind](straight.values())
    learn(optimizer, straight, range(3))
    saved = collect_state(optimizer, straight.items())
    assert ("a.absmax1" in saved) == (kind == "8-bit AdamW")
    save_file(saved, tmp_path / "state")
    weights = {name: parameter.detach().clone() for name, parameter in straight.items()}
    learn(optimizer, straight, range(3, 8))

    resumed = make()
    for name, parameter in resumed.items():
        parameter.data.copy_(weights[name])
    optimizer = OPTIMIZERS[kind](resumed.values())
    restore_state(optimizer, resumed.items(), load_file(tmp_path / "state"))
    learn(optimizer, resumed, range(3, 8))

    for name, parameter in straight.items():
        assert torch.equal(resumed[name], parameter), name


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_state_of_another_optimizer_is_refused() -> None:
    weights = {"a": torch.nn.Parameter(torch.randn(90, 50))}
    plain, small = OPTIMIZERS["AdamW"](weights.values()), OPTIMIZERS["8-bit AdamW"](weights.values())
    learn(plain, weights, range(1))
    learn(small, weights, range(1))
    for one, other in ((plain, small), (small, plain)):
        with pytest.raises(InternalError, match="of a: it is of another optimizer"):
            restore_state(one, weights.items(), collect_state(other, weights.items()))


SHARDED = "works in blocks of whole weights, and FSDP shards the adapter"
EIGHT_BIT = {
    "one GPU": ({"gpusPerNode": 1}, None),
    "two GPUs": ({"gpusPerNode": 2}, SHARDED),
    "two GPUs, each with all of the adapter": ({"gpusPerNode": 2, "strategy": "ddp"}, None),
    "one GPU and host memory": ({"gpusPerNode": 1, "cpuOffload": True}, SHARDED),
    "no GPU": ({"gpusPerNode": 0}, "needs GPUs"),
}


@pytest.mark.parametrize("case", EIGHT_BIT)
def test_where_8_bit_adamw_can_work(case: str, make_run: Make) -> None:
    parallelism, refusal = EIGHT_BIT[case]
    run = make_run(training={"optimizer": "paged-adamw-8bit"}, parallelism=parallelism)
    if refusal is None:
        check_run(run)
        assert optimizer_name(run, fused=True) == "paged_adamw_8bit"
    else:
        with pytest.raises(BadSpecError, match=f"training.optimizer: paged-adamw-8bit {refusal}"):
            check_run(run)


def test_liger_is_refused_where_it_cannot_work() -> None:
    model = build(FAMILIES["a plain head"])
    with pytest.raises(BadSpecError, match="liger needs GPUs"):
        apply_levers(model, Levers(liger=True), torch.device("cpu"))
    with pytest.raises(BadSpecError, match="Liger has no kernels for the family cohere"):
        apply_levers(build(FAMILIES["logits multiplied"]), Levers(liger=True), torch.device("cuda"))

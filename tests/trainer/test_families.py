"""Every model family: what is found of it, and the whole way from its files to a published adapter that PEFT loads."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from lora_api.run import RunSpec
from lora_api.training import LoRA
from lora_trainer.adapter import unify
from lora_trainer.architecture import (
    Architecture,
    check_supported,
    choose_attention,
    installed_flash_attention,
    read_architecture,
    resolve_targets,
)
from lora_trainer.errors import BadSpecError
from lora_trainer.model import choose_pad_token, load_base_model, load_skeleton, load_tokenizer
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.stop import StopRequest
from lora_trainer.store import split_uri
from lora_trainer.train import train
from tests.support.families import FAMILIES, build_config, build_table, make_family
from tests.support.seaweed import free_ports
from tests.trainer.runs import ROOT, SOURCES

TOLERANCE = 1e-5
"""Largest difference of a logit. On one machine the files give the very numbers of the trained model: 0."""

WITH_NEW_TOKENS = ("llama-3", "llama-3-tied", "gemma-3", "gemma-3-vision", "phi-2", "mixtral")
"""Heads that are tied, that are not, and with a bias; embeddings that scale."""
NEW_TOKENS = {"newTokens": ["<|ticket|>", "<|end-of-ticket|>"]}

CASES: dict[str, dict[str, Any]] = {
    **{family: {"family": family, "run": {}} for family in FAMILIES},
    "without quantization": {"family": "llama-3", "run": {"quantization": {"type": "none"}}},
    "rsLoRA and patterns": {
        "family": "llama-3",
        "run": {
            "lora": {
                "useRslora": True,
                "rankPattern": {"down_proj": 8, "q_proj": 2},
                "alphaPattern": {"self_attn.v_proj": 32},
            }
        },
    },
    "rank pattern on a list of modules": {
        "family": "qwen-2.5",
        "run": {"lora": {"targetModules": ["q_proj", "mlp.up_proj"], "rankPattern": {"up_proj": 1}}},
    },
    **{f"new tokens of {family}": {"family": family, "run": {"lora": NEW_TOKENS}} for family in WITH_NEW_TOKENS},
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What two processes saw that trained all ``CASES``, by the name of the case."""
    directory = tmp_path_factory.mktemp("matrix")
    cases = directory / "cases.json"
    cases.write_text(json.dumps(CASES))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*SOURCES, ROOT))),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    command = [sys.executable, "-m", "tests.trainer.family_worker", str(cases), str(directory)]
    workers = []
    for rank in range(2):
        with (directory / f"log-{rank}").open("w") as log:
            environment = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
    try:
        codes = [worker.wait(timeout=500) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0, 0], (directory / "log-0").read_text()[-5000:]
    results = [json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(2)]

    def look(case: str) -> dict[str, Any]:
        for result in results:
            assert "error" not in result[case], result[case]["error"]
        return {**results[0][case], "directory": directory / case.replace(" ", "-") / "adapter"}

    return look


@pytest.mark.parametrize("case", CASES)
def test_a_family_trained_on_two_processes_is_the_same_model_when_it_is_loaded_again(
    case: str, matrix: Callable[[str], dict[str, Any]]
) -> None:
    seen = matrix(case)
    assert seen["finite"]
    assert len(seen["losses"]) == 2
    assert seen["difference"] <= TOLERANCE
    assert seen["learned"] > 1000 * TOLERANCE
    assert seen["layers"] == seen["sharded_layers"] == 2
    config = json.loads((seen["directory"] / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None


def test_patterns_are_published_as_one_rank_and_one_alpha(matrix: Callable[[str], dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    directory = matrix("rsLoRA and patterns")["directory"]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, True)
    tensors = load_file(directory / "adapter_model.safetensors")
    ranks = {name: tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()}
    assert set(ranks.values()) == {8}
    used = {
        part: {int(tensor.any(1).sum()) for name, tensor in tensors.items() if f"{part}.lora_A" in name}
        for part in ("q_proj", "k_proj", "down_proj")
    }
    assert used == {"q_proj": {2}, "k_proj": {4}, "down_proj": {8}}


def test_unified_weights_have_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x.lora_A.weight": torch.randn(2, 5, generator=generator),
        "x.lora_B.weight": torch.randn(3, 2, generator=generator),
        "y.lora_A.weight": torch.randn(4, 5, generator=generator),
        "y.lora_B.weight": torch.randn(3, 4, generator=generator),
    }
    unified = unify(tensors, {"x": (2, 3.0), "y": (4, 0.5)}, rank=4, scale=0.5)
    assert {tuple(unified[f"{name}.lora_A.weight"].shape) for name in "xy"} == {(4, 5)}
    for name, scale in (("x", 3.0), ("y", 0.5)):
        before = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        after = 0.5 * unified[f"{name}.lora_B.weight"] @ unified[f"{name}.lora_A.weight"]
        torch.testing.assert_close(after, before)
    assert unified["y.lora_B.weight"] is tensors["y.lora_B.weight"]


def skeleton(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(family))


def test_the_table_of_families_in_the_documentation_is_what_the_code_finds() -> None:
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    start = lines.index(build_table()[0])
    assert lines[start : start + len(FAMILIES) + 2] == build_table()


def test_an_adapter_never_sits_on_routers_experts_the_head_or_a_vision_encoder() -> None:
    found = read_architecture(skeleton("qwen-2-moe"))
    assert found.head == "lm_head"
    assert found.routers == ("model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.shared_expert_gate")
    assert len(found.experts) == 4
    assert not {*found.routers, *found.experts, found.head} & set(found.linears)
    assert set(found.unquantized) == {*found.routers, found.head}
    vision = read_architecture(skeleton("gemma-3-vision"))
    assert vision.others
    assert all("vision_tower" in name for name in vision.others)
    targets = resolve_targets(vision, LoRA())
    assert "model.language_model.layers.1.self_attn.q_proj" in targets
    assert not [name for name in targets if "vision" in name]


WRONG_TARGETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such layer": ("llama-3", {"targetModules": ["query"]}, r"targetModules: query is no linear layer .* down_proj"),
    "the output head": ("llama-3", {"targetModules": ["lm_head"]}, "targetModules: lm_head is the output head"),
    "a router": ("qwen-2-moe", {"targetModules": ["shared_expert_gate"]}, "is a router, which is never adapted"),
    "experts": ("mixtral", {"targetModules": ["experts"]}, "all experts in one parameter, which stays frozen"),
    "a part of the experts": ("mixtral", {"targetModules": ["gate_up_proj"]}, "which stays frozen"),
    "a layer of the vision encoder": ("gemma-3-vision", {"targetModules": ["fc1"]}, "fc1 is no linear layer"),
    "a pattern for no target": (
        "llama-3",
        {"targetModules": ["q_proj"], "rankPattern": {"v_proj": 2}},
        "rankPattern: v_proj is none of the modules that get an adapter: q_proj",
    ),
    "an alpha for no target": ("llama-3", {"alphaPattern": {"gate": 2}}, "alphaPattern: gate is none"),
    "half a name": ("llama-3", {"targetModules": ["proj"]}, "proj is no linear layer"),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_wrong_targets_are_refused(case: str) -> None:
    family, lora, words = WRONG_TARGETS[case]
    found = read_architecture(skeleton(family))
    with pytest.raises(BadSpecError, match=f"lora.*{words}"):
        resolve_targets(found, LoRA.model_validate(lora))


def test_a_model_without_layers_is_refused() -> None:
    class Flat(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(BadSpecError, match="Flat has no list of decoder layers"):
        read_architecture(Flat())  # type: ignore[arg-type]


def test_gpt2_has_no_linear_layers() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(BadSpecError, match="GPT2LMHeadModel has no linear layers"):
        read_architecture(model)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "model_type is None"),
    "unknown": ({"model_type": "llama9"}, "'llama9', which this version of transformers does not know"),
    "own code": ({"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}, r"brings its own code \(auto_map\)"),
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "t5 has an encoder"),
    "encoder-decoder without a word": ({"model_type": "bart"}, "has an encoder"),
    "encoder": ({"model_type": "bert"}, "has an encoder"),
    "quantized": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    "state space": ({"model_type": "mamba", "state_size": 16}, "state_size: mamba has recurrent"),
    "hybrid": ({"model_type": "jamba", "mamba_d_state": 16}, "mamba_d_state: jamba has recurrent"),
    "linear attention": (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        "layer_types: qwen3_next has recurrent",
    ),
    "image classifier": ({"model_type": "vit"}, "no causal language model"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_says_so(case: str) -> None:
    config, words = UNSUPPORTED[case]
    with pytest.raises(BadSpecError, match=words):
        check_supported(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_supported(family: str) -> None:
    check_supported(json.loads(build_config(family).to_json_string()))


FA2, FA3 = "flash_attention_2", "flash_attention_3"
ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "a CPU": ({"capability": None}, "sdpa"),
    "a CPU, and softcapping": ({"capability": None, "sdpa": False}, "eager"),
    "nothing installed": ({"present": []}, "sdpa"),
    "nothing installed, and softcapping": ({"present": [], "sdpa": False}, "eager"),
    "Hopper": ({}, FA3),
    "Hopper, and softcapping": ({"sdpa": False}, FA3),
    "Hopper with FlashAttention 2": ({"present": [FA2]}, FA2),
    "Ampere": ({"capability": (8, 6)}, FA2),
    "Ampere with FlashAttention 3": ({"capability": (8, 0), "present": [FA3]}, "sdpa"),
    "Blackwell": ({"capability": (10, 0)}, FA2),
    "Turing": ({"capability": (7, 5)}, "sdpa"),
    "float32": ({"half": False}, "sdpa"),
    "a model that cannot": ({"flash": False}, "sdpa"),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_the_attention_implementation(case: str) -> None:
    changes, want = ATTENTION[case]
    usual = {"flash": True, "sdpa": True, "capability": (9, 0), "half": True, "present": [FA2, FA3]}
    assert choose_attention(**{**usual, **changes}) == want


@pytest.mark.parametrize(
    "name", ["kernels--kernels-community--flash-attn2", "models--kernels-community--vllm-flash-attn3"]
)
def test_kernels_in_the_hubs_cache_are_not_used(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / name).mkdir()
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: True)
    assert installed_flash_attention() == []


def test_the_package_of_flash_attention_is_found_beside_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.8.3'\n")
    about = tmp_path / "flash_attn-2.8.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (about / "top_level.txt").write_text("flash_attn\n")
    script = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from lora_trainer.architecture import installed_flash_attention\n"
        "print(installed_flash_attention())"
    )
    path = os.pathsep.join(map(str, (*SOURCES, tmp_path)))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_CACHE": str(tmp_path / "empty")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([FA2])


PAD_TOKENS: dict[str, tuple[list[str], str]] = {
    "Llama 3.1": (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
    "Llama 3": (["<|eot_id|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
                "<|reserved_special_token_0|>"),
    "Llama 2": ([], "<unk>"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAD_TOKENS)
def test_the_end_token_pads_only_where_there_is_nothing_else(case: str) -> None:
    from tokenizers import Tokenizer, models

    special, want = PAD_TOKENS[case]
    words = Tokenizer(models.BPE({"<unk>": 0, "</s>": 1, "a": 2}, [], unk_token="<unk>"))
    unknown = {"unk_token": "<unk>"} if case == "Llama 2" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", **unknown)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    assert choose_pad_token(tokenizer) == want
    bare = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert choose_pad_token(bare) == "</s>"


def test_the_end_is_learned_even_where_it_is_the_pad_token(tmp_path: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = load_tokenizer(make_family("smollm-2", tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token
    end = tokenizer.eos_token_id
    records = [{"input_ids": [5, end], "labels": [5, end]}, {"input_ids": [5, 6, end], "labels": [5, 6, end]}]
    labels = DataCollatorForLanguageModeling(pad_token_id=end)(records)["labels"]
    assert labels.tolist() == [[5, end, -100], [5, 6, end]]


def test_int8_learns_what_the_unquantized_model_learns_and_is_published(
    make_run: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    losses = {}
    for kind in ("none", "int8"):
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / kind))
        run = make_run(quantization={"type": kind}, training={"maxSteps": 6, "learningRate": 0.05})
        adapter = train(run, Place(0, 0, 1), StopRequest(), Progress(enabled=False))
        assert adapter is not None
        losses[kind] = (adapter.eval_loss_before, adapter.eval_loss_after)
        assert losses[kind][1] < losses[kind][0]
    assert losses["int8"] == pytest.approx(losses["none"], abs=0.002)
    directory = Path("/" + split_uri(adapter.uri)[1].lstrip("/"))
    source = Path(run.base_model.uri.removeprefix("file://"))
    base = load_base_model(source, run.quantization, torch.device("cpu"))
    held = {type(module).__name__ for module in base.modules() if isinstance(module, nn.Linear)}
    assert held == {"FrozenInt8", "Linear"}, "layers in int8, and the output head"
    assert isinstance(PeftModel.from_pretrained(base, directory), PeftModel)


def test_a_model_is_judged_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "state_size": 16}))
    with pytest.raises(BadSpecError, match="recurrent"):
        load_skeleton(tmp_path)


def test_the_parts_that_stay_in_the_compute_type() -> None:
    found = Architecture((), ("a.q",), ("a.router",), ("a.experts.w",), ("vision.fc",), "lm_head")
    assert found.unquantized == ["a.router", "lm_head", "vision.fc"]

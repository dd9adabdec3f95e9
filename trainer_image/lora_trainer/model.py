"""The quantized, frozen base model, its tokenizer, and the adapter around it (QLoRA, arXiv:2305.14314)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_api.run import RunSpec
from lora_api.training import LoRA, Quantization
from lora_trainer.architecture import (
    Architecture,
    attention_implementation,
    check_supported,
    read_architecture,
    resolve_targets,
)
from lora_trainer.compilers import keep_compiled_kernels_out
from lora_trainer.devices import product_type
from lora_trainer.errors import BadSpecError, InternalError, TrainerError, describe
from lora_trainer.experts import pack_parameter
from lora_trainer.loading import Part, keeping, packing
from lora_trainer.loss import add_token_scores, check_head
from lora_trainer.modelfiles import read_json_object
from lora_trainer.packed import freeze_int8

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
"""Files that transformers reads for a tokenizer, where they are there: each is one JSON object."""


def training_device(run: RunSpec, local_rank: int) -> torch.device:
    """The device that this process trains on.

    Raises:
        InternalError: a GPU is asked for and not there.
    """
    if run.parallelism.gpus_per_node == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available() or torch.cuda.device_count() <= local_rank:
        raise InternalError(
            f"parallelism.gpusPerNode is {run.parallelism.gpus_per_node}, but this pod sees "
            f"{torch.cuda.device_count()} GPUs; is the GPU driver of the node older than CUDA {torch.version.cuda}?"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def compute_dtype(quantization: Quantization, device: torch.device) -> torch.dtype:
    """Type of the matrix products.

    Raises:
        BadSpecError: bfloat16 on a CPU.
    """
    return product_type(quantization.compute_dtype, device)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Makes a BadSpecError of whatever the libraries raise over a file of the model; ``what`` begins its message.

    A disk that fails, and memory that ends, are not the file's fault.
    """
    try:
        yield
    except Exception as error:
        broken_machine = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        if broken_machine or isinstance(error, TrainerError):
            raise
        raise BadSpecError(f"{what}: {describe(error)}") from error


def load_config(directory: Path) -> PreTrainedConfig:
    """The model's ``config.json``, as transformers reads it.

    Raises:
        BadSpecError: it cannot be read, or the model cannot be trained.
    """
    check_supported(read_json_object(directory / "config.json"))
    with _reading("config.json: transformers cannot read it"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The model's tokenizer, with a padding token.

    Raises:
        BadSpecError: it cannot be read; the message names the files.
    """
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    for file in files:
        read_json_object(file)
    names = ", ".join(file.name for file in files) or "no tokenizer.json"
    try:
        with _reading(f"baseModel: its tokenizer cannot be loaded ({names})"):
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except BadSpecError:
        load_config(directory)  # says so, where it is config.json that is broken
        raise
    if tokenizer.pad_token is None:
        tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def choose_pad_token(tokenizer: Tokenizer) -> str:
    """A token that pads, for a tokenizer that names none: one that no text has, if there is one.

    In this order: a special token that is called pad (Llama 3.1: <|finetune_right_pad_id|>), a reserved one (Llama 3:
    <|reserved_special_token_0|>), the unknown token (Llama 2, Mistral), and the end token. Many scripts take the end
    token at once, and a collator that finds padding by its number then hides every end from the loss: such a model
    never stops. Ours goes by position, so even the last choice is sound.
    """
    ends = {tokenizer.eos_token, tokenizer.bos_token}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for word in ("pad", "reserved", "unused"):
        for token in special:
            if word in token.lower() and token not in ends:
                return token
    if tokenizer.unk_token is not None and tokenizer.unk_token not in ends:
        return str(tokenizer.unk_token)
    return str(tokenizer.eos_token)


def quantization_config(
    quantization: Quantization, dtype: torch.dtype, architecture: Architecture
) -> BitsAndBytesConfig | None:
    """Settings for bitsandbytes, or ``None`` for weights in ``dtype``.

    Packed weights are stored as bytes, which is the default. As numbers of type ``dtype``, which FSDP of older versions
    needs (accelerate#3987), some of them would be changed where CUDA copies them (decision 036).
    """
    if quantization.type == "none":
        return None
    if quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=architecture.unquantized)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=architecture.unquantized,
    )


def load_skeleton(directory: Path) -> PreTrainedModel:
    """The model without weights, on the meta device: its modules and their shapes.

    Raises:
        BadSpecError: it cannot be trained.
    """
    config = load_config(directory)
    if (directory / "generation_config.json").is_file():
        with _reading("baseModel: generation_config.json cannot be read"):
            GenerationConfig.from_pretrained(directory)
    with _reading("config.json: transformers cannot build a model from it"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def load_base_model(
    directory: Path, quantization: Quantization, device: torch.device, part: Part | None = None
) -> PreTrainedModel:
    """The base model on ``device``, quantized and frozen; with ``part``, that part of each weight alone.

    Raises:
        BadSpecError: it cannot be trained.
    """
    dtype = compute_dtype(quantization, device)
    skeleton = load_skeleton(directory)
    check_head(skeleton)
    with packing(partial(pack_parameter, quantization=quantization)), keeping(part):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            quantization_config=quantization_config(quantization, dtype, read_architecture(skeleton)),
            device_map={"": device},
            attn_implementation=attention_implementation(skeleton, device, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    return make_base(model)


def make_base(model: PreTrainedModel) -> PreTrainedModel:
    """What makes a base model to train on of ``model``, whose weights are there: frozen, with the loss of this trainer.

    Raises:
        BadSpecError: its head is not of the kind that the loss needs.
    """
    keep_compiled_kernels_out()
    keep_differentiable(model)
    freeze_int8(model)
    add_token_scores(model)
    model.requires_grad_(requires_grad=False)
    return model


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking the weights on CPUs with AVX512-BF16.

    A forward pass in evaluation mode repacks NF4 weights there into a layout that has no backward pass; training after
    it is silently wrong (bitsandbytes 0.50.2: a loss of 24).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def lora_config(lora: LoRA, targets: list[str]) -> LoraConfig:
    """The adapter's shape, within what vLLM serves: no DoRA, no bias, no extra modules."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def add_adapter(model: PreTrainedModel, lora: LoRA, seed: int) -> PeftModel:
    """``model`` with a fresh adapter: A random, the same on every rank; B zero, so that it changes nothing yet.

    Raises:
        BadSpecError: a target module is not in the model.
    """
    targets = resolve_targets(read_architecture(model), lora)
    set_seed(seed)
    wrapped = get_peft_model(model, lora_config(lora, targets))
    assert isinstance(wrapped, PeftModel)  # noqa: S101 - for the type checker
    return wrapped

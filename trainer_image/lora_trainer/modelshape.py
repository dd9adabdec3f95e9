"""The shape of a model, from its Hugging Face ``config.json``: what a memory plan has to know, and no weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_trainer.errors import BadSpecError

MAX_NUMBER = 2**31 - 1
"""No size of a model is larger."""


class UnplannedModelError(BadSpecError):
    """An architecture whose memory cannot be planned. It may train all the same."""


@dataclass(frozen=True)
class Linear:
    """One linear layer: its name inside a transformer layer, and its width on both sides."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * self.outputs

    def is_named(self, target: str, layer: int = 0) -> bool:
        """Whether an entry ``target`` of PEFT's ``target_modules``, or a key of its ``rank_pattern``, means this one.

        It does if the name ends with it. ``layer`` is the number of the transformer layer that it is in.
        """
        return f"model.layers.{layer}.{self.name}".endswith(f".{target}")


@dataclass(frozen=True)
class Family:
    """What ``model_type`` says beyond the numbers of the file. Defaults are those of transformers 5.19.

    ``norms`` counts the RMSNorms over the hidden size in a layer; ``head_norms`` is set where queries and keys are
    normalised too. ``experts`` are the keys that may count the experts of a mixture, ``expert_width`` is the one that
    has their inner width, and ``shared_width`` that of an expert beside them which all tokens go through. ``eager`` is
    set where attention is more than PyTorch's SDPA can do (Gemma 2 caps its scores), so that without FlashAttention all
    scores of a layer exist. ``biases`` names the linear layers that have one, ``optional_biases`` those that a key of
    the file gives one to. ``defaults`` holds values that published files leave out.
    """

    norms: int = 2
    head_norms: bool = False
    fused: bool = False
    tied: bool = False
    experts: tuple[str, ...] = ()
    expert_width: str = "intermediate_size"
    shared_width: str = ""
    eager: bool = False
    biases: str = ""
    optional_biases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int] | None = None


_QKV, _QKVO, _MLP = "q_proj k_proj v_proj", "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
_ATTENTION_BIAS = {"attention_bias": _QKVO}
_BOTH_BIASES = {**_ATTENTION_BIAS, "mlp_bias": _MLP}
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(optional_biases=_BOTH_BIASES),
    "mistral": Family(),
    "qwen2": Family(biases=_QKV),
    "qwen3": Family(head_norms=True, optional_biases=_ATTENTION_BIAS, defaults={"head_dim": 128}),
    "gemma2": Family(
        norms=4,
        tied=True,
        eager=True,
        optional_biases=_ATTENTION_BIAS,
        defaults={**_GEMMA, "vocab_size": 256_000},
    ),
    "gemma3_text": Family(
        norms=4,
        head_norms=True,
        tied=True,
        optional_biases=_ATTENTION_BIAS,
        defaults={**_GEMMA, "vocab_size": 262_208},
    ),
    "phi3": Family(fused=True),
    "smollm3": Family(tied=True, optional_biases=_BOTH_BIASES),
    "mixtral": Family(experts=("num_local_experts",)),
    "qwen2_moe": Family(
        experts=("num_experts",),
        expert_width="moe_intermediate_size",
        shared_width="shared_expert_intermediate_size",
        optional_biases={"qkv_bias": _QKV},
        defaults={"qkv_bias": True},
    ),
    "qwen3_moe": Family(
        head_norms=True,
        experts=("num_experts", "num_local_experts"),  # as published, and as transformers 5 writes it
        expert_width="moe_intermediate_size",
        optional_biases=_ATTENTION_BIAS,
    ),
}
"""By ``model_type``. SmolLM and SmolLM2 are llama; SmolLM3 has a type of its own."""

NESTED = {"gemma3": "gemma3_text"}
"""Models with a vision part: the language model's numbers are in ``text_config``, of the type on the right."""


@dataclass(frozen=True)
class Weights:
    """How many weights a model has: ``linear`` in linear layers, ``experts`` in routed experts, and the ``rest``.

    Linear layers are quantized as ``quantization.type`` says, experts by nf4 alone, the rest never.
    """

    linear: int
    rest: int
    experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.rest + self.experts


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    ``feed_forward`` is the inner width of one MLP (of one expert), ``shared`` that of an expert beside them which all
    tokens go through (0: none), ``head_size`` the width of one attention head.
    ``biased`` names the linear layers that have a bias.
    """

    architecture: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    experts_per_token: int = 1
    shared: int = 0
    biased: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """Traits of the architecture."""
        return FAMILIES[self.architecture]

    @property
    def is_mixture(self) -> bool:
        """Whether each layer has experts in place of an MLP."""
        return bool(self.family.experts)

    @property
    def mlp_width(self) -> int:
        """Inner values of all MLPs that a token goes through."""
        return self.experts_per_token * self.feed_forward + self.shared

    @property
    def attention_width(self) -> int:
        """Width of all query heads together; mostly the hidden size."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_size

    @property
    def norm_width(self) -> int:
        """Elements that a layer's RMSNorms read, per token."""
        on_heads = self.attention_width + self.kv_width if self.family.head_norms else 0
        return self.family.norms * self.hidden + on_heads

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one transformer layer: those that are quantized and may get an adapter."""
        h, f, q, kv = self.hidden, self.feed_forward, self.attention_width, self.kv_width
        output = Linear("self_attn.o_proj", q, h)
        if self.family.fused:
            return (
                Linear("self_attn.qkv_proj", h, q + 2 * kv),
                output,
                Linear("mlp.gate_up_proj", h, 2 * f),
                Linear("mlp.down_proj", f, h),
            )
        attention = (
            Linear("self_attn.q_proj", h, q),
            Linear("self_attn.k_proj", h, kv),
            Linear("self_attn.v_proj", h, kv),
            output,
        )
        mlp, f = ("mlp.shared_expert", self.shared) if self.is_mixture else ("mlp", f)
        if not f:
            return attention
        return (
            *attention,
            Linear(f"{mlp}.gate_proj", h, f),
            Linear(f"{mlp}.up_proj", h, f),
            Linear(f"{mlp}.down_proj", f, h),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear layers: 2hq + 2h kv + 3hf."""
        return sum(linear.weights for linear in self.linears)

    @property
    def expert_weights(self) -> int:
        """Weights of one layer's routed experts: E 3hf. transformers 5 keeps them in two parameters."""
        return self.experts * 3 * self.hidden * self.feed_forward if self.is_mixture else 0

    @property
    def router_weights(self) -> int:
        """Weights of one layer's router: E h, and h for the gate of a shared expert. Never quantized."""
        if not self.is_mixture:
            return 0
        return self.hidden * (self.experts + (1 if self.shared else 0))

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding and the output head: 2Vh, or Vh when they are tied. Never quantized."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def small_weights(self) -> int:
        """Weights of all norms and biases, which are less than 0.01% of a large model's. Never quantized."""
        norms = self.family.norms * self.hidden + (2 * self.head_size if self.family.head_norms else 0)
        biases = sum(one.outputs for one in self.linears if one.name.rpartition(".")[2] in self.biased)
        return self.layers * (norms + biases) + self.hidden

    @property
    def weights(self) -> "Weights":
        """All weights, by how they can be quantized."""
        rest = self.layers * self.router_weights + self.embedding_weights + self.small_weights
        return Weights(self.layers * self.layer_weights, rest, self.layers * self.expert_weights)

    @property
    def total_weights(self) -> int:
        """All weights: those of transformers' model, in the test over all families to the last one."""
        return self.weights.total

    def targets(self, names: list[str]) -> tuple[Linear, ...]:
        """The linear layers of one transformer layer that get an adapter.

        Raises:
            BadSpecError: a name is not in the model.
        """
        if names == ["all-linear"]:
            return self.linears
        for name in names:
            if not any(linear.is_named(name) for linear in self.linears):
                known = ", ".join(linear.name.rpartition(".")[2] for linear in self.linears)
                raise BadSpecError(
                    f"lora.targetModules: {name} is no linear layer of a {self.architecture} layer; there are {known}"
                )
        return tuple(linear for linear in self.linears if any(linear.is_named(name) for name in names))


def read_shape(config: object) -> ModelShape:
    """The shape that ``config``, the content of a ``config.json``, describes.

    Raises:
        UnplannedModelError: the memory of this architecture cannot be planned.
        BadSpecError: something is not understood; the message names the key.
    """
    if not isinstance(config, Mapping):
        raise BadSpecError("config.json: must be an object with model_type, hidden_size and so on")
    numbers, prefix = config, ""
    model_type = str(config.get("model_type"))
    if model_type in NESTED:
        nested = config.get("text_config")
        if not isinstance(nested, Mapping):
            raise BadSpecError(f"config.json: text_config is missing; a {model_type} model describes its sizes there")
        numbers, prefix, model_type = nested, "text_config.", NESTED[model_type]
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES.keys() | NESTED.keys()))
        raise UnplannedModelError(f"config.json: model_type is {model_type!r}; memory can be planned for {known}")
    if config.get("quantization_config") is not None:
        raise BadSpecError(
            "config.json: quantization_config: the weights are quantized already; use the original model"
        )
    return _read_numbers(numbers, prefix, model_type, _is_tied(config, numbers, FAMILIES[model_type]))


def _is_tied(config: Mapping[str, Any], numbers: Mapping[str, Any], family: Family) -> bool:
    for place in (numbers, config):
        tied = place.get("tie_word_embeddings")
        if isinstance(tied, bool):
            return tied
        if tied is not None:
            raise BadSpecError(f"config.json: tie_word_embeddings is {tied!r}; it must be true or false")
    return family.tied


def _read_numbers(numbers: Mapping[str, Any], prefix: str, model_type: str, tied: bool) -> ModelShape:
    family = FAMILIES[model_type]

    def number(key: str, default: int | None = None) -> int:
        value = numbers.get(key)
        if value is None:
            value = (family.defaults or {}).get(key, default)
        if value is None:
            raise BadSpecError(f"config.json: {prefix}{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_NUMBER:
            shown = repr(value)[:40]
            raise BadSpecError(
                f"config.json: {prefix}{key} is {shown}; it must be a whole number from 1 to {MAX_NUMBER}"
            )
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    kv_heads = number("num_key_value_heads", heads if model_type in ("llama", "phi3") else None)
    if heads % kv_heads:
        raise BadSpecError(
            f"config.json: {prefix}num_key_value_heads is {kv_heads}; it must divide num_attention_heads = {heads}"
        )
    whole, rest = divmod(hidden, heads)
    head_size = number("head_dim", None if rest else whole)
    if family.experts:
        _check_all_layers_alike(numbers, prefix)
    keys = [key for key in family.experts if numbers.get(key) is not None] or list(family.experts)
    experts = number(keys[0]) if keys else 1
    chosen = number("num_experts_per_tok") if family.experts else 1
    if chosen > experts:
        raise BadSpecError(f"config.json: {prefix}num_experts_per_tok is {chosen}; there are only {experts} experts")
    return ModelShape(
        architecture=model_type,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        feed_forward=number(family.expert_width),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=number("vocab_size"),
        tied=tied,
        experts=experts,
        experts_per_token=chosen,
        shared=number(family.shared_width) if family.shared_width else 0,
        biased=_read_biases(numbers, prefix, family),
    )


def _check_all_layers_alike(numbers: Mapping[str, Any], prefix: str) -> None:
    """Qwen's mixtures may have layers with one MLP in between; those have other weights."""
    for key, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        value = numbers.get(key)
        if value is not None and value != usual:
            raise UnplannedModelError(
                f"config.json: {prefix}{key} is {str(value)[:40]}; memory can be planned where all layers are mixtures"
            )


def _read_biases(numbers: Mapping[str, Any], prefix: str, family: Family) -> tuple[str, ...]:
    found = family.biases.split()
    for key, names in family.optional_biases.items():
        value = numbers.get(key)
        if value is None:
            value = bool((family.defaults or {}).get(key))
        if not isinstance(value, bool):
            raise BadSpecError(f"config.json: {prefix}{key} is {value!r}; it must be true or false")
        found += names.split() if value else []
    return tuple(found)

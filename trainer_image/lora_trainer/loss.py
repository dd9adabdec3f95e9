"""Cross-entropy of the supervised tokens alone, one value a token, in one pass that also makes the gradient.

Training, preferences, evaluation and ``lora_trainer evaluate`` all take it from here.

The output head is the widest product of a language model: with a vocabulary of 128,000 the logits of 4,096 tokens are
1 GiB in bfloat16, and their float32 forms three times as much. So they never exist together. Tokens without a label
(prompts, padding) do not go through the head at all; the others go in chunks, and each chunk's gradient is made while
its logits are there, so that the backward pass neither keeps nor recomputes them. A token's value depends on its own
hidden state alone, so whatever a loss makes of it is a factor of that gradient. The head has to be frozen, but for a
few rows (lora.newTokens), as it is for LoRA. The method is that of Liger's fused linear cross-entropy (Hsu et al. 2024,
arXiv:2410.10989), in torch, for every device: its own kernels, and those of TRL's head, are Triton's, which compile at
their first use and need a C compiler and Python's headers. ``torch.nn.functional.linear_cross_entropy`` (2.13) has no
soft cap and no learned rows, and with a value for each token it computes the logits again in the backward pass.
"""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from lora_trainer.errors import BadSpecError, InternalError
from lora_trainer.rows import HeadRows, whole

IGNORED = -100
"""Label of a token that nothing is learned from, as PyTorch's cross-entropy has it."""

CHUNK_BYTES = 256 * 2**20
"""Size of one chunk's logits in float32: about 500 tokens of Llama 3. Larger chunks are not faster on CPUs."""

MIN_CHUNK = 64


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the head's product: z = softcap tanh(scale y / softcap).

    ``softcap``: Gemma 2's final_logit_softcapping; ``None``: none. ``scale``: Cohere multiplies, Granite divides.
    """

    scale: float = 1.0
    softcap: float | None = None


def logit_transform(config: PretrainedConfig) -> LogitTransform | None:
    """The transform that ``config`` asks for; ``None`` where it has a setting that is not known to be right here.

    The names are those of transformers' modelling code (5.23): each is read by the family's own forward pass.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scale = float(getattr(text, name))
            break
    else:
        if getattr(text, "logits_scaling", None) is not None:
            divisor = float(text.logits_scaling)
            if not divisor:
                return None
            scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    return LogitTransform(scale, getattr(text, "final_logit_softcapping", None))


class TokenLosses(torch.autograd.Function):
    """-log p(label) of each token, from the head's input. Of the head only learned rows get a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        transform: LogitTransform,
        rows: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The losses in nats, float32, of shape (tokens,).

        Args:
            ctx: autograd's context.
            hidden: (tokens, hidden size), any floating-point type.
            weight: (vocabulary, hidden size) of the head.
            bias: (vocabulary) of the head, or none.
            labels: (tokens), int64, none of them ``IGNORED``.
            transform: what the family does to the logits.
            rows: (rows, hidden size), float32, what learns in the rows ``ids`` of the head, or none.
            ids: (rows), int64.

        Raises:
            InternalError: the head is trained, and would get no gradient.
        """
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise InternalError("the output head must be frozen: nothing here makes a gradient for it")
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        losses = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        gradient = torch.empty_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        learned = None if rows is None else rows.to(dtype)
        row_slopes = None
        if rows is not None and gradient is not None:
            row_slopes = torch.empty(len(hidden), len(rows), device=hidden.device)
        with torch.autocast(device, enabled=False):
            weight = weight.to(dtype)
            for part in _chunks(len(hidden), len(weight)):
                given = hidden[part].to(dtype)
                logits = nn.functional.linear(given, weight, None if bias is None else bias.to(dtype))
                if learned is not None:
                    logits.index_add_(1, ids, given @ learned.T)
                losses[part], slope = _cross_entropy(logits.float(), labels[part, None], transform)
                if gradient is None:
                    continue
                gradient[part] = _exact_product(slope.to(dtype), weight)
                if row_slopes is not None and learned is not None:
                    row_slopes[part] = slope[:, ids]
                    gradient[part] += _exact_product(row_slopes[part].to(dtype), learned)
        ctx.save_for_backward(gradient, row_slopes, None if rows is None else hidden)
        ctx.vocabulary, ctx.dtype = len(weight), hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales the gradients that were made on the way forward: in float32, so that they are rounded once.

        In bfloat16 the factor itself, 1 / tokens, would be up to 0.4 % wrong, and every gradient of the step with it;
        so would what is scaled after it was rounded, or before.
        """
        gradient, row_slopes, hidden = ctx.saved_tensors
        factor = outputs[0].float()[:, None]
        scaled = torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=ctx.dtype))
        of_rows = None
        if row_slopes is not None:
            of_rows = torch.zeros(row_slopes.shape[1], hidden.shape[1], device=hidden.device)
            for part in _chunks(len(hidden), ctx.vocabulary):
                of_rows += (row_slopes[part] * factor[part]).T @ hidden[part].float()
        return scaled, None, None, None, None, of_rows, None


def _exact_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right``, in float32 where they are of 16 bits: GPUs sum up in it anyway, and need not round the sum."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Tokens whose logits exist together."""
    size = max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (tokens,), and their gradients by the head's product, in the memory of ``logits`` (tokens, vocabulary)."""
    curvature = None
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    if transform.softcap is not None:
        squashed = logits.div_(transform.softcap).tanh_()
        curvature = 1 - squashed.square()
        logits = squashed.mul_(transform.softcap)
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = (normalizer - logits.gather(1, labels)).squeeze(1)
    slope = logits.sub_(normalizer).exp_()
    slope.scatter_add_(1, labels, torch.full_like(normalizer, -1.0))
    if curvature is not None:
        slope.mul_(curvature)
    if transform.scale != 1.0:
        slope.mul_(transform.scale)
    return losses, slope


@dataclass
class TokenScores(ModelOutput):
    """What a model gives that is called with ``score_tokens=True``.

    Attributes:
        losses: -log p(label) in nats, float32, of shape (supervised tokens,).
        supervised: which tokens of the labels they are of, bool, of shape (rows, columns): labels without their first
            column.
        router_loss: how unevenly the routers of a mixture use their experts (Fedus et al. 2021, arXiv:2101.03961, eq.
            4), float32, without dimensions; where ``router_loss=True`` asked for it.
    """

    losses: torch.Tensor | None = None
    supervised: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


def check_head(model: PreTrainedModel) -> LogitTransform:
    """What the family does to its logits. Reads no weights: a model on the meta device will do.

    Raises:
        BadSpecError: the losses of ``model`` cannot be computed from its head's weight.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise BadSpecError(
            f"baseModel: the output head of {type(model).__name__} is a {type(head).__name__}, and the loss needs a "
            "plain linear layer (torch.nn.Linear)"
        )
    transform = logit_transform(model.config)
    if transform is None:
        raise BadSpecError("config.json: logits_scaling is 0, by which the logits would be divided")
    return transform


def router_loss_weight(model: PreTrainedModel) -> float | None:
    """TRL's ``router_aux_loss_coef``: ``None`` for what the model's config says, 0 where TRL cannot compute the loss.

    TRL 1.16 asks the config for ``num_experts``, which that of Phi-3.5-MoE does not have. The loss keeps experts evenly
    used while a router learns; here routers are frozen, so it can be spared.
    """
    return None if hasattr(model.config.get_text_config(), "num_experts") else 0.0


def add_token_scores(model: PreTrainedModel) -> None:
    """Lets ``model(..., labels=..., score_tokens=True)`` return TokenScores. All other calls stay as they are.

    The call has to go through the whole model, in which FSDP2 gathers the head's weight.

    Raises:
        BadSpecError: its head is not of the kind that this needs.
    """
    transform = check_head(model)
    plain = type(model).forward

    @functools.wraps(plain)  # generate() reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_tokens: bool = False,
        router_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not score_tokens:
            return plain(self, *args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if router_loss:
            kwargs["output_router_logits"] = True
        output = self.base_model(*args, **kwargs)
        hidden = output.last_hidden_state
        if shifted is None:
            hidden, shifted = hidden[:, :-1], labels[:, 1:]
        head = self.get_output_embeddings()
        rows, ids = (head.rows, head.ids) if isinstance(head, HeadRows) else (None, None)
        frozen = head.base if isinstance(head, HeadRows) else head
        weight, bias = whole(frozen.weight), None if frozen.bias is None else whole(frozen.bias)
        supervised = shifted != IGNORED
        losses = TokenLosses.apply(hidden[supervised], weight, bias, shifted[supervised], transform, rows, ids)
        balance = _router_loss(self.config, output.router_logits, kwargs.get("attention_mask")) if router_loss else None
        return TokenScores(losses=losses, supervised=supervised, router_loss=balance)

    model.forward = types.MethodType(forward, model)


def _router_loss(config: PretrainedConfig, logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
    """The families' own loss of their routers, in float32; without a ``mask`` every token counts."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = config.get_text_config()
    exact = tuple(layer.float() for layer in logits)
    found: torch.Tensor = load_balancing_loss_func(exact, text.num_experts, text.num_experts_per_tok, mask)
    return found

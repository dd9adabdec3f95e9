"""Cross-entropy of the supervised tokens alone, in one pass that also makes the gradient.

The output head is the widest product of a language model: with a vocabulary of 128,000 the logits of 4,096 tokens are
1 GiB in bfloat16, and their float32 forms three times as much. So they never exist together. Tokens without a label
(prompts, padding) do not go through the head at all; the others go in chunks, and each chunk's gradient is made while
its logits are there, so that the backward pass neither keeps nor recomputes them. That needs a loss that is a sum over
tokens, and a head that is frozen, but for a few rows (lora.newTokens): both hold for LoRA. The method is that of
Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), in torch, for every device.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

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


class SummedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log p(label), from the head's input. Of the head only learned rows get a gradient."""

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
        """The loss in nats, float32, without dimensions.

        Args:
            ctx: autograd's context.
            hidden: (tokens, hidden size), any floating-point type.
            weight: (vocabulary, hidden size) of the head.
            bias: (vocabulary) of the head, or none.
            labels: (tokens), int64, none of them ``IGNORED``.
            transform: what the family does to the logits.
            rows: (rows, hidden size), float32, what learns in the rows ``ids`` of the head, or none.
            ids: (rows), int64.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        learned = None if rows is None else rows.to(dtype)
        row_gradient = None if rows is None else torch.zeros_like(rows)
        chunk = max(MIN_CHUNK, CHUNK_BYTES // (4 * weight.shape[0]))
        with torch.autocast(device, enabled=False):
            weight = weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                given = hidden[part].to(dtype)
                logits = torch.nn.functional.linear(given, weight, None if bias is None else bias.to(dtype))
                if learned is not None:
                    logits.index_add_(1, ids, given @ learned.T)
                loss, slope = _cross_entropy(logits.float(), labels[part, None], transform)
                total += loss
                if gradient is None:
                    continue
                gradient[part] = slope.to(dtype) @ weight
                if learned is not None:
                    of_rows = slope[:, ids].to(dtype)
                    gradient[part] += of_rows @ learned
                    row_gradient += of_rows.T @ given
        ctx.save_for_backward(gradient, row_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales the gradients that were made on the way forward."""
        gradient, row_gradient = ctx.saved_tensors
        of_rows = None if row_gradient is None else row_gradient * outputs[0].to(row_gradient.dtype)
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, of_rows, None


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses, and its gradient by the head's product, in the memory of ``logits`` (tokens, vocabulary)."""
    curvature = None
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    if transform.softcap is not None:
        squashed = logits.div_(transform.softcap).tanh_()
        curvature = 1 - squashed.square()
        logits = squashed.mul_(transform.softcap)
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = (normalizer - logits.gather(1, labels)).sum()
    slope = logits.sub_(normalizer).exp_()
    slope.scatter_add_(1, labels, torch.full_like(normalizer, -1.0))
    if curvature is not None:
        slope.mul_(curvature)
    if transform.scale != 1.0:
        slope.mul_(transform.scale)
    return loss, slope


@dataclass
class SupervisedOutput(ModelOutput):
    """What a model gives that is called with ``summed_loss=True``: nats over all supervised tokens, undivided."""

    loss: torch.Tensor | None = None


def has_summed_loss(model: PreTrainedModel) -> bool:
    """Whether the loss of ``model`` can be computed here: a frozen, plain head, and no loss for a router."""
    head = model.get_output_embeddings()
    head = head.base if isinstance(head, HeadRows) else head
    text = model.config.get_text_config()
    routed = getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0.0)
    plain = type(head) is torch.nn.Linear and not any(one.requires_grad for one in head.parameters())
    return plain and not routed and logit_transform(model.config) is not None


def router_loss_weight(model: PreTrainedModel) -> float | None:
    """TRL's ``router_aux_loss_coef``: ``None`` for what the model's config says, 0 where TRL cannot compute the loss.

    TRL 1.16 asks the config for ``num_experts``, which that of Phi-3.5-MoE does not have. The loss keeps experts evenly
    used while a router learns; here routers are frozen, so it can be spared.
    """
    return None if hasattr(model.config.get_text_config(), "num_experts") else 0.0


def add_summed_loss(model: PreTrainedModel) -> None:
    """Lets ``model(..., labels=..., summed_loss=True)`` return a SupervisedOutput. All other calls stay as they are.

    The call has to go through the whole model, in which FSDP2 gathers the head's weight.
    """
    transform = logit_transform(model.config)
    assert transform is not None  # noqa: S101 - has_summed_loss was asked
    inner = model.forward

    @functools.wraps(inner)
    def forward(self: PreTrainedModel, *args: Any, summed_loss: bool = False, **kwargs: Any) -> Any:
        if not summed_loss:
            return inner(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shifted is None:
            hidden, shifted = hidden[:, :-1], labels[:, 1:]
        head = self.get_output_embeddings()
        rows, ids = (head.rows, head.ids) if isinstance(head, HeadRows) else (None, None)
        frozen = head.base if isinstance(head, HeadRows) else head
        weight, bias = whole(frozen.weight), None if frozen.bias is None else whole(frozen.bias)
        supervised = shifted != IGNORED
        return SupervisedOutput(
            loss=SummedCrossEntropy.apply(hidden[supervised], weight, bias, shifted[supervised], transform, rows, ids)
        )

    model.forward = types.MethodType(forward, model)

"""The quality gate: whether an adapter is good enough to be published (publish.gate)."""

from lora_api.publishing import Gate
from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError


def check_gate_has_records(run: RunSpec, eval_records: int) -> None:
    """A gate without evaluation records would let everything through.

    The API server refuses it too. It cannot see that ``evalFraction`` of a small dataset is no record at all.

    Raises:
        BadSpecError: there is a gate and nothing to measure.
    """
    if run.publish.gate is not None and eval_records == 0:
        raise BadSpecError(
            "publish.gate needs records to evaluate on, and this run has none: set dataset.eval, or a larger "
            "dataset.evalFraction"
        )


def decide_gate(gate: Gate | None, before: float | None, after: float | None) -> str | None:
    """Why the adapter is refused, with both losses (nats per token), or ``None`` where it passes.

    Both bounds include their end: an improvement of exactly minEvalLossImprovement passes.
    """
    if gate is None:
        return None
    if before is None or after is None:
        return "there is no evaluation loss to compare with publish.gate"
    reasons = []
    least, largest = gate.min_eval_loss_improvement, gate.max_eval_loss
    if least is not None and not before - after >= least:
        reasons.append(f"publish.gate.minEvalLossImprovement asks for an improvement of {least:g}")
    if largest is not None and not after <= largest:
        reasons.append(f"publish.gate.maxEvalLoss allows {largest:g}")
    if not reasons:
        return None
    return (
        f"the evaluation loss was {before:.4f} before training and is {after:.4f} after it, {_change(before - after)}: "
        + ", and ".join(reasons)
    )


def _change(improvement: float) -> str:
    if improvement > 0:
        return f"better by {improvement:.4f}"
    return f"worse by {-improvement:.4f}" if improvement < 0 else "no better"

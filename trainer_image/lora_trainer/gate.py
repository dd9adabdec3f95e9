"""The quality gate: whether an adapter is good enough to be published (publish.gate)."""

from dataclasses import dataclass

from lora_api.publishing import Gate, GateBase
from lora_api.run import RunSpec
from lora_api.served import ServedEvaluation
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


@dataclass(frozen=True)
class Losses:
    """The evaluation losses that the gate looks at (nats per token), and on which base they were measured, in words."""

    base: GateBase
    before: float | None
    after: float | None
    where: str = ""


def choose_losses(
    gate: Gate | None, before: float | None, after: float | None, served: ServedEvaluation | None
) -> Losses:
    """Those on the base as it is served, if they are there and ``gate`` does not ask for the others.

    ``before`` and ``after`` are those of all evaluation records on the base that was trained on.
    """
    if served is None or (gate is not None and gate.base == "training"):
        return Losses("training", before, after, "" if served is None else " on the base that was trained on")
    if not served.is_measured:
        return Losses("training", before, after, f" on the base that was trained on ({served.problem})")
    if served.same_base:
        return Losses("served", before, after)
    where = f" on the base as it is served ({served.dtype}, {served.describe_records()})"
    return Losses("served", served.before.loss, served.after.loss, where)


def decide_gate(gate: Gate | None, losses: Losses) -> str | None:
    """Why the adapter is refused, with both losses (nats per token), or ``None`` where it passes.

    Both bounds include their end: an improvement of exactly minEvalLossImprovement passes.
    """
    if gate is None:
        return None
    before, after = losses.before, losses.after
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
        f"the evaluation loss{losses.where} was {before:.4f} before training and is {after:.4f} after it, "
        f"{_change(before - after)}: " + ", and ".join(reasons)
    )


def _change(improvement: float) -> str:
    if improvement > 0:
        return f"better by {improvement:.4f}"
    return f"worse by {-improvement:.4f}" if improvement < 0 else "no better"

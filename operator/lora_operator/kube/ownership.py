"""Whose an object is that has the name of a child already. Pure."""

from dataclasses import dataclass

from lora_api import KIND, LoRAFineTune
from lora_operator.names import ATTEMPT_LABEL, PREFLIGHT_LABEL, RUN_LABEL
from lora_operator.objects import Raw, controller_of


@dataclass(frozen=True)
class Conflict:
    """Why an object cannot be taken for the child. ``passing``: it is about to go, so that waiting helps."""

    message: str
    passing: bool


def find_conflict(child: Raw, found: Raw, run: LoRAFineTune) -> Conflict | None:
    """What is wrong with ``found``, unless it belongs to ``run`` and says of itself to be ``child``."""
    kind, metadata = child["kind"], found["metadata"]
    owner = controller_of(metadata)
    deleting = "deletionTimestamp" in metadata
    if owner.get("uid") == run.metadata.uid and not deleting:
        return _find_other_labels(child, metadata) if kind == "Job" else None
    belongs = f"belongs to {owner['kind']} {owner['name']}" if owner else "belongs to no LoRAFineTune"
    earlier = owner.get("kind") == KIND and owner.get("name") == run.metadata.name
    message = f"{kind} {metadata['name']} exists already and {belongs}"
    return Conflict(message, passing=deleting or earlier)


def _find_other_labels(child: Raw, found: Raw) -> Conflict | None:
    """Without our labels no watch tells of a Job: it was made by somebody else, in the name of the run."""
    wanted, labels = child["metadata"]["labels"], found.get("labels") or {}
    for name in (RUN_LABEL, ATTEMPT_LABEL, PREFLIGHT_LABEL):
        if wanted.get(name) != labels.get(name):
            message = (
                f"{child['kind']} {found['name']} exists already and was not made by the operator, though it names the "
                f"run as its owner: its label {name} is {labels.get(name, 'not there')}"
            )
            return Conflict(message, passing=False)
    return None

"""A child that the API server finds invalid because of a field of the run: which field of its specification. Pure."""

import re

_CONTAINER = r"spec\.template\.spec\.(?:initContainers|containers)\[0\]\."
"""The trainer, and what asks for its Secret: webhooks put theirs behind them, as a rule."""
_OWN = (
    (
        _CONTAINER + r"env(?:From)?\[\d+\]\.(?:valueFrom\.secretKeyRef|secretRef)\.name",
        "spec.credentials.secretRef.name",
    ),
    (_CONTAINER + r"(resources|env)\b", r"spec.podTemplate.\1"),
    (r"spec\.template\.spec\.(nodeSelector|tolerations|imagePullSecrets)", r"spec.podTemplate.\1"),
    (r"spec\.template\.(?:metadata\.)?(labels|annotations)", r"spec.podTemplate.\1"),
    (r"spec\.template\.spec\.(priorityClassName)", r"spec.runPolicy.\1"),
)
"""Paths in a Job, and what of a run they are made of."""
_FIELD = re.compile(r"spec\.(?:podTemplate\.\w+|runPolicy\.\w+|credentials\.secretRef\.name)")
_NEXT = re.compile(r", (?=(?:spec|metadata)\.)")
"""What stands between two reasons in the API server's list of them."""


def translate(words: str) -> str | None:
    """``words`` of a refusal with the run's fields in the place of the Job's; ``None``: they are of no field of it.

    Both containers take the Secret, key by key: what is the same of each is said once.
    """
    _, invalid, reasons = words.partition(" is invalid: ")
    if not invalid:
        return None
    said = reasons
    for path, own in _OWN:
        said = re.sub(path, own, said)
    if said == reasons:
        return None
    several = said.startswith("[") and said.endswith("]")
    return "; ".join(dict.fromkeys(_NEXT.split(said[1:-1]))) if several else said


def describe_remedy(told: str) -> str:
    """What to do about ``told``, which has the run's fields."""
    fields = ", ".join(dict.fromkeys(_FIELD.findall(told)))
    return (
        f"Correct {fields} of the run, or the same in its ClusterLoRARuntime (of a preflight also preflightResources), "
        "then delete this LoRAFineTune and create it again."
    )

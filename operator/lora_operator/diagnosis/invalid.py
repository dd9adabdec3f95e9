"""A child that the API server finds invalid because of a field of the run: which field of its specification. Pure."""

import re

_OWN = (
    (r"spec\.template\.spec\.(?:initContainers|containers)\[\d+\]\.(resources|env)", r"spec.podTemplate.\1"),
    (r"spec\.template\.spec\.(nodeSelector|tolerations|imagePullSecrets)", r"spec.podTemplate.\1"),
    (r"spec\.template\.(?:metadata\.)?(labels|annotations)", r"spec.podTemplate.\1"),
    (r"spec\.template\.spec\.(priorityClassName)", r"spec.runPolicy.\1"),
)
"""Paths in a Job, and what of a run they are made of."""
_FIELD = re.compile(r"spec\.(?:podTemplate|runPolicy)\.\w+")


def translate(words: str) -> str | None:
    """``words`` of a refusal with the run's fields in the place of the Job's; ``None``: they are of no field of it."""
    _, invalid, reasons = words.partition(" is invalid: ")
    if not invalid:
        return None
    said = reasons
    for path, own in _OWN:
        said = re.sub(path, own, said)
    return said if said != reasons else None


def describe_remedy(told: str) -> str:
    """What to do about ``told``, which has the run's fields."""
    fields = ", ".join(dict.fromkeys(_FIELD.findall(told)))
    return (
        f"Correct {fields} of the run, or the same in its ClusterLoRARuntime (of a preflight also preflightResources), "
        "then delete this LoRAFineTune and create it again."
    )

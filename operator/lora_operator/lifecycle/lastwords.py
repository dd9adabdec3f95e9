"""The last words that go on record with a failure: the ends of logs, which are read first. All pure."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from lora_api import Failure, FailureClass
from lora_api._base import LONGEST_CHARACTER, clean_text, measure
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Notes, Plan
from lora_operator.watched.views import PodView

PATIENCE = 15.0
"""Seconds after which a failure goes on record without the words that nobody could read."""

CHARACTERS = 4000
SPEAKERS = 8
"""Of a gang that stalled, so many pods are heard."""


def await_words(observed: Observed, plan: Plan, now: datetime) -> Plan:
    """``plan`` with the last words of the pods that its failure is about, or the wish to read them first."""
    if plan.failed is None:
        return plan
    failure = plan.failed.failure
    pods, reports = find_speakers(observed, failure), observed.reports
    unread = tuple(pod for pod in pods if pod.uid not in reports.last_words)
    waited = (now - (reports.awaiting_since or now)).total_seconds()
    if unread and waited < PATIENCE:
        return Plan(notes=Notes(words_of=unread), requeue_after=PATIENCE - waited)
    words = {pod.name: reports.last_words.get(pod.uid) for pod in pods}
    told = failure.model_copy(update={"log_tail": compute_log_tail(failure, words)})
    return replace(plan, failed=replace(plan.failed, failure=told))


def find_speakers(observed: Observed, failure: Failure) -> list[PodView]:
    """The pods whose logs tell of ``failure``: the one that it names; of a gang that stalled, those that run."""
    if failure.failure_class is FailureClass.STALLED and failure.pod is None:
        return [pod for pod in observed.pods if pod.running and not pod.gone][:SPEAKERS]
    pod = next((pod for pod in observed.pods if pod.name == failure.pod and not pod.gone), None)
    return [pod] if pod is not None and (pod.running or pod.ended) else []


def compute_log_tail(failure: Failure, words: Mapping[str, str | None]) -> str | None:
    """What goes on record of ``words``, by the names of their pods: an equal share of what there is room for."""
    if failure.failure_class is not FailureClass.STALLED or failure.pod is not None:
        return next((_keep_end(text, CHARACTERS) for text in words.values() if text), None)
    share = CHARACTERS // max(1, len(words))
    lines = []
    for name, text in words.items():
        head = f"{name}: "
        lines.append(head + _keep_end((text or "no log").strip(), share - len(head) - 1))
    return "\n".join(lines) or None


def _keep_end(text: str, size: int) -> str:
    """The end of ``text`` in at most ``size`` bytes, as they are written into an object."""
    kept = str(clean_text(text))[-size:] if size > 0 else ""
    while (excess := measure(kept) - size) > 0 and kept:
        kept = kept[max(1, excess // LONGEST_CHARACTER) :]
    return kept

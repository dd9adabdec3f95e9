"""Prometheus metrics. One registry an operator, so that several can run in one process."""

from collections import Counter as Count
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora_api import ConditionType, LoRAFineTuneStatus

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_WAIT = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
_RUN = (60.0, 300.0, 900.0, 1800.0, 3600.0, 2 * 3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0, 7 * 24 * 3600.0)


@dataclass(frozen=True)
class Readings:
    """What is asked when metrics are read, so that nothing has to be kept in step."""

    runs_by_phase: Callable[[], Count[str]]
    tokens_per_second: Callable[[], Mapping[str, float]]
    queue_depth: Callable[[], int]
    refused_namespaces: Callable[[], Sequence[str]] = tuple


class Metrics:
    """All that the operator counts. What is no reading is counted when a status has been written."""

    def __init__(self, readings: Readings) -> None:
        self.registry = CollectorRegistry()
        self.failures = Counter(
            "lora_operator_failures",
            "Failed attempts by namespace and failure class.",
            ["namespace", "failure_class"],
            registry=self.registry,
        )
        self.reconciles = Histogram(
            "lora_operator_reconcile_duration_seconds",
            "Time to look at one run once.",
            ["outcome"],
            buckets=_QUICK,
            registry=self.registry,
        )
        self.calls = Counter(
            "lora_operator_api_calls",
            "Calls to the API server, watches aside, by verb, resource and HTTP status.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self._queue_wait = self._histogram(
            "queue_wait", "Time from the creation of an attempt until every pod has a node.", _WAIT
        )
        self._startup = self._histogram("startup", "Time from then until every pod of the gang runs.", _WAIT)
        self._duration = Histogram(
            "lora_operator_run_duration_seconds",
            "Time from the first attempt of a run to its end, by how it ended.",
            ["namespace", "outcome"],
            buckets=_RUN,
            registry=self.registry,
        )
        self._gpu_seconds = Counter(
            "lora_operator_gpu_seconds",
            "Time that gangs have run, times their GPUs, counted when a gang stops.",
            ["namespace"],
            registry=self.registry,
        )
        self.registry.register(_Gauges(readings))

    def count_change(self, namespace: str, old: LoRAFineTuneStatus, new: LoRAFineTuneStatus, now: datetime) -> None:
        """Counts what a write of a status tells: a gang was scheduled, began, stopped, failed, or the run ended."""
        for failure in new.failures:
            if failure not in old.failures:
                self.failures.labels(namespace, str(failure.failure_class)).inc()
        if (since := _became_true(ConditionType.SCHEDULED, old, new)) is not None:
            self._queue_wait.labels(namespace).observe((now - since).total_seconds())
        if _became_true(ConditionType.RUNNING, old, new) is not None:
            scheduled = _since(ConditionType.SCHEDULED, new)
            self._startup.labels(namespace).observe((now - scheduled).total_seconds() if scheduled else 0.0)
        self._gpu_seconds.labels(namespace).inc(max(0, new.gpu_seconds - old.gpu_seconds))
        if new.completion_time is not None and old.completion_time is None:
            seconds = (new.completion_time - (new.start_time or new.completion_time)).total_seconds()
            self._duration.labels(namespace, str(new.phase)).observe(seconds)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lora_operator_{name}_seconds", text, ["namespace"], buckets=buckets, registry=self.registry)


def _since(kind: ConditionType, status: LoRAFineTuneStatus) -> datetime | None:
    return next((item.last_transition_time for item in status.conditions if item.type == kind), None)


def _became_true(kind: ConditionType, old: LoRAFineTuneStatus, new: LoRAFineTuneStatus) -> datetime | None:
    """Since when ``kind`` was not true, where ``new`` is the first to say that it is; else ``None``."""
    holds = [any(item.type == kind and item.status == "True" for item in status.conditions) for status in (old, new)]
    return (_since(kind, old) or new.start_time) if holds == [False, True] else None


class _Gauges(Collector):
    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        runs = GaugeMetricFamily("lora_operator_runs", "LoRAFineTune objects by phase.", labels=["phase"])
        for phase, count in sorted(self._readings.runs_by_phase().items()):
            runs.add_metric([phase], count)
        yield runs
        tokens = GaugeMetricFamily(
            "lora_operator_tokens_per_second", "Tokens per second of all runs that train.", labels=["namespace"]
        )
        for namespace, speed in sorted(self._readings.tokens_per_second().items()):
            tokens.add_metric([namespace], speed)
        yield tokens
        depth = GaugeMetricFamily("lora_operator_queue_depth", "Runs that are due to be looked at.")
        depth.add_metric([], self._readings.queue_depth())
        yield depth
        refused = GaugeMetricFamily(
            "lora_operator_namespace_refused",
            "1 for each namespace of --namespaces that the operator may not read, and so does not serve.",
            labels=["namespace"],
        )
        for namespace in self._readings.refused_namespaces():
            refused.add_metric([namespace], 1)
        yield refused

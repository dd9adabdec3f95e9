"""Prometheus metrics. One registry an operator, so that several can run in one process."""

from collections import Counter as Count
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All that the operator counts.

    ``runs_by_phase`` and ``queue_depth`` are asked when metrics are read, so nothing has to be kept in step.
    """

    def __init__(self, runs_by_phase: Callable[[], Count[str]], queue_depth: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.failures = Counter(
            "lora_operator_failures", "Failed attempts by failure class.", ["failure_class"], registry=self.registry
        )
        self.reconciles = Histogram(
            "lora_operator_reconcile_duration_seconds",
            "Time to look at one run once.",
            ["outcome"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.calls = Counter(
            "lora_operator_api_calls",
            "Calls to the API server, watches aside, by verb, resource and HTTP status.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.registry.register(_Gauges(runs_by_phase, queue_depth))


class _Gauges(Collector):
    def __init__(self, runs_by_phase: Callable[[], Count[str]], queue_depth: Callable[[], int]) -> None:
        self._runs_by_phase = runs_by_phase
        self._queue_depth = queue_depth

    def collect(self) -> Iterator[Metric]:
        runs = GaugeMetricFamily("lora_operator_runs", "LoRAFineTune objects by phase.", labels=["phase"])
        for phase, count in sorted(self._runs_by_phase().items()):
            runs.add_metric([phase], count)
        yield runs
        depth = GaugeMetricFamily("lora_operator_queue_depth", "Runs that are due to be looked at.")
        depth.add_metric([], self._queue_depth())
        yield depth

"""Runs of the tests: submit, look at, wait for."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from demo import stack
from demo.stack import Store
from devcluster import Cluster
from lora_api import Condition, LoRAFineTune, Phase, ProgressLine, parse_progress_line

END_SECONDS = 300


@dataclass
class Runs:
    """Submits runs into one namespace and removes them."""

    cluster: Cluster
    store: Store
    namespace: str
    _names: list[str] = field(default_factory=list)

    def submit(self, name: str, **changes: Any) -> str:
        """Applies a small run on two nodes; ``changes`` are merged into its spec."""
        spec: dict[str, Any] = {
            "baseModel": {"uri": self.store.uri("base/tiny-llama")},
            "dataset": {"train": {"uri": self.store.uri("data/tiny/good.jsonl")}, "maxSeqLength": 64},
            "lora": {"r": 4, "alpha": 8},
            "training": {"maxSteps": 10, "learningRate": 0.001, "globalBatchSize": 4},
            "parallelism": {"nodes": 2, "gpusPerNode": 0},
            "checkpoint": {"everySteps": 20},
            "publish": {"store": self.store.uri("adapters")},
            "credentials": {"secretRef": {"name": stack.SECRET}},
            "podTemplate": {"resources": {"requests": {"cpu": "200m"}, "limits": {"memory": "4Gi"}}},
        }
        manifest = {
            "apiVersion": "lorafinetune.io/v1alpha1",
            "kind": "LoRAFineTune",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": merge(spec, changes),
        }
        self.kubectl("delete", "lorafinetune", name, "--ignore-not-found", "--cascade=foreground", timeout=180)
        stack.apply(self.cluster, manifest)
        self._names.append(name)
        return name

    def remove(self) -> None:
        """Deletes what was submitted, and waits until its pods are gone."""
        for name in self._names:
            self.kubectl("delete", "lorafinetune", name, "--ignore-not-found", "--cascade=foreground", timeout=180)

    def fetch(self, name: str) -> LoRAFineTune:
        """The run as it is now."""
        return stack.fetch_run(self.cluster, self.namespace, name)

    def kubectl(self, *arguments: str, timeout: float = 60) -> str:
        """kubectl in the tests' namespace."""
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, timeout=timeout)

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Pods of the run, of every attempt."""
        text = self.kubectl("get", "pods", f"--selector=lorafinetune.io/name={name}", "--output=json")
        items: list[dict[str, Any]] = json.loads(text)["items"]
        return items

    def progress_lines(self, pod: str) -> list[ProgressLine]:
        """What the trainer in ``pod`` has reported."""
        lines = self.kubectl("logs", pod).splitlines()
        return [line for line in map(parse_progress_line, lines) if line is not None]

    def wait(
        self, name: str, what: str, holds: Callable[[LoRAFineTune], bool], timeout: float = END_SECONDS
    ) -> LoRAFineTune:
        """Waits until ``holds`` of the run; a failure shows what the operator and the pods said."""
        deadline = time.monotonic() + timeout
        while True:
            run = self.fetch(name)
            if holds(run):
                return run
            if time.monotonic() > deadline or (run.status.phase == Phase.FAILED and not holds(run)):
                pods = self.kubectl("get", "pods", "--output=wide")
                raise AssertionError(f"{name}: not so: {what}\n{self.kubectl('describe', 'lft', name)}\n{pods}")
            time.sleep(0.5)

    def wait_end(self, name: str, timeout: float = END_SECONDS) -> LoRAFineTune:
        """Waits until the run has succeeded or failed."""
        ends = (Phase.SUCCEEDED, Phase.FAILED)
        return self.wait(name, "the run has ended", lambda run: run.status.phase in ends, timeout)

    def wait_step(self, name: str, step: int) -> LoRAFineTune:
        """Waits until the status shows at least ``step``."""
        return self.wait(name, f"step {step} is reported", lambda run: _step(run) >= step)


def _step(run: LoRAFineTune) -> int:
    return run.status.progress.step if run.status.progress else 0


def find_condition(run: LoRAFineTune, kind: str) -> Condition:
    """The condition of the run with this type."""
    return next(condition for condition in run.status.conditions if condition.type == kind)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` merged into it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged

"""A cluster in its steady state: which pod of which gang is on which node, and what the gangs write. All pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from bench.scale.bench import quantile
from bench.scale.client import Raw
from bench.scale.residents import HISTORY, build_run
from lora_api import ProgressLine

STEPS_PER_SECOND = 10
"""Of every gang. Each tenth step is logged, as by default."""

UNTOLD_SECONDS = 500.0
"""So late is progress at the beginning, and stays for a gang whose log is never read."""

TOTAL_STEPS = 1_000_000
LOG_LINES = 200
"""As many as the operator asks for."""


@dataclass(frozen=True)
class SteadySize:
    """How much runs, for how long, and what breaks.

    Of ``gangs`` gangs of ``pods`` pods each, ``rack`` nodes die and ``hung`` kubelets hang. New runs come ``rate`` a
    second in ``seconds`` that all is well, and again in ``seconds`` of trouble, once ``warm_seconds`` have passed.
    """

    gangs: int
    pods: int
    rack: int
    hung: int
    rate: float
    warm_seconds: float
    seconds: float
    flags: tuple[str, ...] = ()

    @property
    def layout(self) -> "Layout":
        """Where everything is."""
        return Layout(self.gangs, self.pods, self.rack, self.hung)


FULL_STEADY = SteadySize(gangs=500, pods=8, rack=16, hung=24, rate=1.0, warm_seconds=30.0, seconds=60.0)
TINY_STEADY = SteadySize(
    gangs=8, pods=2, rack=2, hung=2, rate=2.0, warm_seconds=3.0, seconds=6.0,
    flags=("--log-interval=1", "--progress-interval=1", "--node-grace=2"),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Nodes and gangs in blocks: as many gangs as a gang has pods share as many nodes, each with one pod on each node.

    So every node has rank 0 of one gang, and a rack that dies takes whole gangs with it.
    """

    gangs: int
    pods: int
    rack: int
    hung: int

    @property
    def nodes(self) -> int:
        """How many there are."""
        return math.ceil(self.gangs / self.pods) * self.pods

    def node(self, gang: int, rank: int) -> int:
        """The node that a pod is on."""
        return gang // self.pods * self.pods + (gang + rank) % self.pods

    def is_dead(self, node: int) -> bool:
        """Whether it is in the rack that dies."""
        return node < self.rack

    def is_hung(self, node: int) -> bool:
        """Whether its kubelet comes to hang."""
        return self.rack <= node < self.rack + self.hung

    @property
    def dead_gangs(self) -> frozenset[int]:
        """Gangs that lose pods with the rack."""
        return frozenset(
            gang for gang in range(self.gangs) if any(self.is_dead(self.node(gang, rank)) for rank in range(self.pods))
        )

    @property
    def silent_gangs(self) -> frozenset[int]:
        """Gangs whose rank 0 is on a node with a kubelet that hangs: nobody can know how far they are."""
        return frozenset(gang for gang in range(self.gangs) if self.is_hung(self.node(gang, 0)))


def node_name(node: int) -> str:
    """Name of a node."""
    return f"node-{node}"


def seat_name(rank: int) -> str:
    """Name of the node that a pod of the template is on."""
    return f"seat-{rank}"


def gang_name(gang: int) -> str:
    """Name of a run."""
    return f"gang-{gang}"


def build_gang(name: str, pods: int) -> Raw:
    """A LoRAFineTune of ``pods`` nodes that goes on for long."""
    run = build_run(name, pods)
    run["spec"]["training"] |= {"maxSteps": TOTAL_STEPS, "globalBatchSize": pods, "microBatchSize": 1}
    return run


def step_at(begin: datetime, now: datetime) -> int:
    """The step that a gang has logged last, which has run since ``begin``."""
    return int((now - begin).total_seconds()) * STEPS_PER_SECOND


def build_log(begin: datetime, now: datetime) -> str:
    """The end of rank 0's log."""
    last = int((now - begin).total_seconds())
    return "".join(
        ProgressLine(
            event="step",
            at=begin + timedelta(seconds=second),
            step=second * STEPS_PER_SECOND,
            total_steps=TOTAL_STEPS,
            epoch=second / 1000,
            loss=round(2.0 - second / 100_000, 5),
            learning_rate=2e-05,
            grad_norm=0.61342,
            tokens_per_second=12473.2,
        ).to_line()
        + "\n"
        for second in range(max(1, last - LOG_LINES + 1), last + 1)
    )


def build_running_progress(begin: datetime, now: datetime) -> Raw:
    """Progress of a gang, with as long a history as there may be."""
    step = step_at(begin, now)
    stride = max(10, step // HISTORY // 10 * 10)
    return {
        "step": step, "totalSteps": TOTAL_STEPS, "percent": 100 * step // TOTAL_STEPS, "summary": "0%", "epoch": 0.1,
        "loss": 1.9, "learningRate": 2e-05, "gradNorm": 0.61342, "tokensPerSecond": 12473.2, "at": f"{now:%FT%TZ}",
        "history": [[float(point), 1.9] for point in range(stride, step, stride)][-HISTORY:],
    }  # fmt: skip


def compute_lags(runs: Iterable[Raw], told: frozenset[str], begin: datetime, now: datetime) -> list[float]:
    """Seconds by which the progress in the status of the runs named ``told`` is late."""
    seconds = (now - begin).total_seconds()
    return [
        round(seconds - ((run.get("status") or {}).get("progress") or {}).get("step", 0) / STEPS_PER_SECOND, 2)
        for run in runs
        if run["metadata"]["name"] in told
    ]


def summarize_latencies(milliseconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the longest."""
    shares = {"p50Ms": 0.5, "p99Ms": 0.99}
    told = {name: round(quantile(milliseconds, share), 1) for name, share in shares.items()}
    return {**told, "maxMs": round(max(milliseconds), 1)}


def compute_rates(counts: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Calls a second, by kind."""
    return {kind: round(count / seconds, 2) for kind, count in counts.items()}

"""The results for people. Pure."""

from collections.abc import Sequence
from typing import Any

from bench.scale.bench import median

Numbers = dict[str, Any]

RATIO = 2.0
"""The aim: launches a second in a burst, ours divided by theirs."""

_HEAD = """# Beside Kubeflow Trainer and JobSet

Written by `make bench-peers`. The peers are built from their Go modules (`devcluster/modules/peers`) and run as they
are shipped: with their configuration files, clients' rates, workers, leader election, roles, CRDs and webhooks. Both
stand in one Go module, so JobSet is compiled with the patch releases of its libraries that Trainer asks for. What
differs from a cluster: they are processes with a user each in place of pods with a service account; the API server
calls their webhooks at an address in place of a Service, with certificates of its own authority in place of theirs; the
conversion webhook of JobSet, which has a single version to convert, is left out.

Each measurement has an etcd and a kube-apiserver of its own, with the same flags. The contenders take turns, and each
round begins with the other one. There are no kubelets and no controllers of Kubernetes: nobody makes pods. A run has
two nodes. Ours is a LoRAFineTune without a preflight, launched by a Service, a NetworkPolicy, a Job and a status;
theirs is a TrainJob of the shipped runtime `torch-distributed`, of which Trainer makes a ConfigMap and a JobSet, and
JobSet a Service and a Job. Times are those of the API server's audit log: from the moment when it received the run
until it had stored the last Job of it.
"""


def _rounds(result: Numbers, name: str, part: str) -> list[Numbers]:
    return [numbers[part] for numbers in result["rounds"][name]]


def ratios(result: Numbers, part: str, key: str) -> list[float]:
    """Ours divided by theirs, round by round."""
    ours, theirs = (_rounds(result, name, part) for name in result["contenders"])
    return [mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True)]


_ROWS: Sequence[tuple[str, str, str]] = (
    ("burst: runs launched a second", "burst", "perSecond"),
    ("one by one: p50, ms", "launches", "p50Ms"),
    ("one by one: p99, ms", "launches", "p99Ms"),
    ("one by one: the longest, ms", "launches", "maxMs"),
    ("burst: own processor ms a run", "burst", "ownCpuMsPerRun"),
    ("burst: API server's processor ms a run", "burst", "apiServerCpuMsPerRun"),
    ("burst: etcd's processor ms a run", "burst", "etcdCpuMsPerRun"),
    ("resident memory after the burst, MiB", "burst", "rssMiB"),
)


def to_markdown(result: Numbers) -> str:
    """docs/benchmarks/peers.md."""
    names, machine = result["contenders"], result["machine"]
    first = result["rounds"][names[0]][0]
    rate = median(ratios(result, "burst", "perSecond"))
    load = ", ".join(f"{numbers['load']:g}" for name in names for numbers in _rounds(result, name, "launches"))
    return "\n".join(
        [
            _HEAD,
            f"Runs launched a second in a burst of {first['burst']['runs']}, {names[0]} / {names[1]}: **{rate:.2f}**, "
            f"the median of {len(result['rounds'][names[0]])} rounds (aim: {RATIO}, "
            f"{'reached' if rate >= RATIO else 'NOT reached'}).",
            "",
            f"| medians | {names[0]} | {names[1]} | ratio |",
            "| --- | --- | --- | --- |",
            *(_row(result, *row) for row in _ROWS),
            "",
            f"One by one: {first['launches']['runs']} runs at {first['launches']['perSecond']:g}/s, after "
            f"{result['first']} that are not counted. Clients' rates, calls a second and at once: "
            + "; ".join(f"{name} {rates}" for name, rates in result["clients"].items())
            + ".",
            "",
            f"The machine: a shared virtual one with {machine['cores']} cores ({machine['processor']}). Processes that "
            f"wanted a core when runs came one by one (load average): {load}.",
            "",
            "## Round by round",
            "",
            "| | " + " | ".join(names) + " | ratio |",
            "| --- | --- | --- | --- |",
            *(_all(result, *row) for row in _ROWS),
            "",
            "## Calls of a run in the burst, leases and watches aside",
            "",
            *(line for name in names for line in _calls(name, _rounds(result, name, "burst")[0]["callsPerRun"])),
        ]
    )


def _row(result: Numbers, title: str, part: str, key: str) -> str:
    cells = [
        f"{median([numbers[key] for numbers in _rounds(result, name, part)]):.4g}" for name in result["contenders"]
    ]
    return f"| {title} | {' | '.join(cells)} | {median(ratios(result, part, key)):.2f} |"


def _all(result: Numbers, title: str, part: str, key: str) -> str:
    cells = [
        ", ".join(f"{numbers[key]:.4g}" for numbers in _rounds(result, name, part)) for name in result["contenders"]
    ]
    shares = ", ".join(f"{ratio:.2f}" for ratio in ratios(result, part, key))
    return f"| {title} | {' | '.join(cells)} | {shares} |"


def _calls(name: str, counts: dict[str, float]) -> list[str]:
    told = ", ".join(f"{count:g} x `{kind}`" for kind, count in counts.items() if count >= 0.05)
    return [f"{name}: {sum(counts.values()):.1f}: {told}.", ""]

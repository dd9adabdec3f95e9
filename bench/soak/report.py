"""The results for people. Pure."""

from collections.abc import Mapping
from typing import Any

Numbers = dict[str, Any]

_HEAD = """# Soak of the operator

Written by `make soak` on a real etcd, kube-apiserver and kube-controller-manager (`devcluster`), with the operator
as its image runs it, as a process of its own with the rights of its role. Users, scheduler and kubelets are played
(`bench/soak/player.py`), the logs of the pods too, in which rank 0 tells of a step each second: each run has a story of
how its preflights and attempts end, and the one state in which it has to end is computed from that and the failure
table. Faults come all the while, and no fault may change an end, nor may any make a gang that speaks look stalled.
"""

_WORLD = """The soak begins under the release before this one, with runs that it knows. Operator and CRDs are upgraded
to today's, then to a release after it, and back, each before the other once; each run keeps the trainer that it began
with. Two nodes reject every pod, and the scheduler likes them best; sidecars come into pods by a webhook; some
namespaces have a quota that is too small until it is raised, or a LimitRange.
"""

_RIGHT = """**Everything is as it has to be:** each run is in the state in which its story ends, with its attempts,
charged restarts and failures; no child is without its owner, no pod runs on, no Job was made twice or after the end of
its run (but once, at most, of a run that was being deleted); nothing is left, in the cluster or in the operator, once
the runs are deleted; the operator has not grown."""


def to_markdown(result: Numbers) -> str:
    """docs/benchmarks/soak.md."""
    machine, wrong = result["machine"], result["wrong"]
    return "\n".join(
        [
            _HEAD,
            *([_WORLD] if "upgrades" in result else []),
            f"Seed {result['seed']}, {result['minutes']:g} minutes ({result['seconds']} s until everything was checked "
            f"and cleared away), {machine['cores']} cores ({machine['processor']}), Python {machine['python']}.",
            "",
            f"**{len(wrong)} things are not as they have to be:**\n" if wrong else _RIGHT,
            *(f"- {line}" for line in wrong),
            "",
            f"## {result['runs']} runs with {result['attempts']} attempts",
            "",
            *_table("end of a run", result["ends"]),
            "",
            *_table("story: a run that ...", result["kinds"]),
            "",
            *_table("failure that a story tells of", result["failures"]),
            "",
            *_faults(result),
            "",
            *_costs(result["memory"], result["calls"]),
            "",
        ]
    )


def _faults(result: Numbers) -> list[str]:
    operators = result["operators"]
    return [
        f"## {sum(result['faults'].values())} faults",
        "",
        *_table("fault", result["faults"]),
        "",
        *_upgrades(result),
        f"The requests of the operators, watches included, by what befell them: {_list(result['requests'])}. "
        f"{operators['started']} operators were started. {operators['failedStarts']} of them ended before they were "
        "ready, as one does whose first LIST fails, and were started again.",
    ]


def _upgrades(result: Numbers) -> list[str]:
    """Nothing for a soak of earlier days, which had none."""
    counts = result.get("upgrades")
    return [*_table("upgrade, in their order", counts, ordered=False), ""] if counts else []


def _costs(memory: Numbers, calls: Mapping[str, int]) -> list[str]:
    minutes = ", ".join(f"{mib:g}" for mib in memory["perMinuteMiB"])
    return [
        "## Memory and calls",
        "",
        f"One operator lived to the end. Of resident memory it had {memory['firstMiB']:g} MiB at second "
        f"{memory['firstAtSecond']} and {memory['lastMiB']:g} MiB at rest at the end, with {memory['moreRuns']} more "
        f"runs; never more than {memory['peakMiB']:g} MiB. It used {memory['cpuSeconds']:g} s of processor time. "
        f"Minute by minute, whichever operator was there: {minutes} MiB.",
        "",
        f"All operators together made {sum(calls.values()):,} calls, watches aside: {_list(calls)}.",
    ]


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _table(name: str, counts: Mapping[str, int], *, ordered: bool = True) -> list[str]:
    keys = sorted(counts) if ordered else list(counts)
    return [f"| {name} | |", "| --- | --- |", *(f"| {key} | {counts[key]} |" for key in keys)]

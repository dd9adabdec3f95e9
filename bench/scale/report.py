"""The results for people. Pure."""

import itertools
from collections.abc import Sequence
from typing import Any

from bench.scale.bench import median
from bench.scale.profile import to_table
from bench.scale.steadyreport import steady_targets, to_lines

Numbers = dict[str, Any]

P50_MS, P99_MS, BURST_PER_SECOND = 30, 80, 60
"""The aims for launches; a prototype reached them on two quiet cores."""

LAUNCH_CALLS, LAUNCH_CALLS_ALONE, LIFE_CALLS = 4, 3, 7
"""Service, NetworkPolicy, Job and status launch a gang; without peers a run needs no Service."""

SHARE_OF_BARE_CALLS = 0.9

_HEAD = """# Scale and cost of the operator

Written by `make bench-operator` on a real etcd and kube-apiserver (`devcluster`), with the operator as its image runs
it (`python -m lora_operator`, default settings but for addresses and `--preflight=off`) as a process of its own with
the rights of its role. There is no kubelet and no Job controller: the bench plays them, makes pods and writes their
statuses (not while launches are measured), and its own cost is in none of the figures, though it takes its share of the
machine. Calls and times are
those of the API server's audit log; memory and processor time those of /proc.
"""


def _middle(rounds: Sequence[Numbers], name: str) -> float:
    return median([numbers[name] for numbers in rounds])


def _all(rounds: Sequence[Numbers], name: str) -> str:
    return ", ".join(f"{numbers[name]:g}" for numbers in rounds)


def targets(result: Numbers) -> list[tuple[str, str, str, bool]]:
    """What was measured, the aim, the result (medians over the rounds), and whether the aim is reached."""
    restart, idle, launches = result["restart"], result["idle"], result["launches"]
    burst, lives, trouble = result["burst"], result["lives"], result["trouble"]
    p50, p99, rate = _middle(launches, "p50Ms"), _middle(launches, "p99Ms"), _middle(burst, "perSecond")
    memory, seen = _middle(restart, "kibPerRun"), _middle(restart, "secondsUntilAllSeen")
    launch = max(numbers["callsPerLaunch"]["max"] for numbers in lives)
    life = max(numbers["callsPerLife"]["max"] for numbers in lives)
    writes = max(numbers["writes"] for numbers in restart)
    calls = max(numbers["calls"] for numbers in idle)
    lost = trouble["runs"] - trouble["succeededAtFirstAttempt"]
    per_second = f"{launches[0]['perSecond']:g}/s"
    share = round(median(_shares_of_bare_calls(result)), 2)
    alone = max(numbers.get("callsPerLaunchAlone", {"max": 0})["max"] for numbers in lives)
    return [
        (f"LoRAFineTune created -> Job stored, at {per_second}, p50", f"< {P50_MS} ms", f"{p50:g} ms", p50 < P50_MS),
        (f"the same, p99 of {launches[0]['runs']}", f"< {P99_MS} ms", f"{p99:g} ms", p99 < P99_MS),
        (
            f"a burst of {burst[0]['runs']} is launched",
            f">= {BURST_PER_SECOND}/s",
            f"{rate:g}/s",
            rate >= BURST_PER_SECOND,
        ),
        (
            "the same, as a share of bare calls around the same round",
            f">= {SHARE_OF_BARE_CALLS}",
            f"{share:g}",
            share >= SHARE_OF_BARE_CALLS,
        ),
        (
            "calls to launch a run of two nodes, Events aside",
            f"<= {LAUNCH_CALLS}",
            f"{launch}",
            launch <= LAUNCH_CALLS,
        ),
        *(
            [
                (
                    "calls to launch a run of one node, Events aside",
                    f"<= {LAUNCH_CALLS_ALONE}",
                    f"{alone}",
                    alone <= LAUNCH_CALLS_ALONE,
                )
            ]
            if alone
            else []
        ),
        ("calls of a whole life, Events and progress aside", f"<= {LIFE_CALLS}", f"{life}", life <= LIFE_CALLS),
        (f"calls in {idle[0]['seconds']:g} s of idling, watches aside", "0", f"{calls}", calls == 0),
        ("memory a LoRAFineTune, with its Job and two pods", "<= 15 KB", f"{memory:g} KiB", memory * 1.024 <= 15),
        ("a restart has looked at all", "<= 20 s", f"{seen:g} s", seen <= 20),
        ("writes at a restart", "0", f"{writes}", writes == 0),
        (f"runs lost of {trouble['runs']} in trouble", "0", f"{lost}", lost == 0 and not trouble["jobsMadeTwice"]),
        *(steady_targets(result["steady"]) if "steady" in result else []),
    ]


def to_markdown(result: Numbers) -> str:
    """docs/benchmarks/operator.md."""
    residents, machine = result["residents"], result["machine"]
    total = residents["finished"] + residents["waiting"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    load = ", ".join(f"{numbers['load']:g}" for numbers in result["launches"])
    return "\n".join(
        [
            _HEAD,
            f"Resident all the while: {total:,} LoRAFineTunes, {residents['finished']:,} finished and "
            f"{residents['waiting']:,} waiting for nodes, each with its Job and two pods, in "
            f"{result['namespaces']} namespaces; the runs of a round come on top, and go with it.",
            f"Medians of {len(result['restart'])} rounds, each with a new operator. Of the runs that come one by one "
            f"the first {result['launches'][0]['first']} are not counted: they find processes that have slept.",
            "",
            "| | aim | measured | |",
            "| --- | --- | --- | --- |",
            *(f"| {what} | {aim} | {got} | {'yes' if ok else 'NO'} |" for what, aim, got, ok in targets(result)),
            "",
            f"The machine: a shared virtual one with {machine['cores']} cores ({machine['processor']}), on which the "
            "API server, etcd, the operator, the bench and other people's work ran at once. Processes that wanted a "
            f"core when the rounds' launches were measured (load average): {load}. Times suffer from that; calls and "
            f"memory do not, processor time a run little. Python {machine['python']}, {versions}.",
            "",
            *_floor(result),
            "",
            "## Round by round",
            "",
            *_rounds(result),
            "",
            *_trouble(result["trouble"]),
            "",
            *_life(result["lives"][0]),
            "",
            *([*to_lines(result["steady"]), ""] if "steady" in result else []),
            *_profile(result["profile"]),
        ]
    )


def _floor(result: Numbers) -> list[str]:
    """The operator against a process that makes the same calls and thinks nothing."""
    pause = 1 / result["launches"][0]["perSecond"]
    own = {part: result[part] for part in ("launches", "burst")}
    bare = {part: [numbers[part] for numbers in result["floor"]] for part in own}
    rows = [
        (f"one by one: longest of the first {result['launches'][0]['first']}, ms", "launches", "firstMaxMs"),
        ("one by one: p50, ms", "launches", "p50Ms"),
        ("one by one: p99, ms", "launches", "p99Ms"),
        ("burst: runs launched a second", "burst", "perSecond"),
        ("burst: API server's processor ms a run", "burst", "apiServerCpuMsPerRun"),
        ("burst: etcd's processor ms a run", "burst", "etcdCpuMsPerRun"),
        ("burst: own processor ms a run", "burst", "operatorCpuMsPerRun"),
    ]
    machine = [
        ("microseconds to touch a page again at once", "touchedAgainUs"),
        (f"the same {pause:g} s later", "touchedLaterUs"),
    ]
    return [
        "## What this machine allows",
        "",
        "Before and after each round a process that only makes the calls of a launch, as the operator was seen to make "
        "them, Event included, launches as many runs (`bench/scale/floor.py`). It decides nothing and remembers "
        "nothing: what it takes is what the API server and etcd take. An operator cannot be much better than that on "
        "the same machine at the same time. Two columns say how near it is: the median of the rounds, each divided by "
        "the mean of the two bare measurements around it; and the best of all rounds divided by the best of the bare "
        "ones, as a round that others disturb says little.",
        "",
        "The machine changes from minute to minute: etcd does the same work for both, and a loop that touches 32 MiB "
        "(`bench/scale/memory.py`) was timed before the runs that came one by one. Where a page that was left alone "
        "for a moment is dear, so is every call that does not come right after another.",
        "",
        "| | operator | bare calls | operator / bare calls | best round / best round |",
        "| --- | --- | --- | --- | --- |",
        *(_compare(name, own[part], bare[part], key) for name, part, key in rows),
        "",
        "| memory | operator's rounds | bare calls |",
        "| --- | --- | --- |",
        *(f"| {name} | {_all(own['launches'], key)} | {_all(bare['launches'], key)} |" for name, key in machine),
        "",
        _bare_aims(bare),
    ]


def _bare_aims(bare: dict[str, list[Numbers]]) -> str:
    """Which of the aims that depend on the machine it lets bare calls reach."""
    reached = {
        "p50": _middle(bare["launches"], "p50Ms") < P50_MS,
        "p99": _middle(bare["launches"], "p99Ms") < P99_MS,
        "the burst": _middle(bare["burst"], "perSecond") >= BURST_PER_SECOND,
    }
    yes, no = (", ".join(name for name, ok in reached.items() if ok is want) or "none" for want in (True, False))
    return f"Of the aims for launches bare calls reach on this machine: {yes}; they miss: {no}."


def _around(bare: Sequence[Numbers], key: str) -> list[float]:
    """The mean of the bare measurements before and after each round."""
    return [(before[key] + after[key]) / 2 for before, after in itertools.pairwise(bare)]


def _shares_of_bare_calls(result: Numbers) -> list[float]:
    """Runs launched a second in the burst of each round, divided by what bare calls did around it."""
    around = _around([numbers["burst"] for numbers in result["floor"]], "perSecond")
    return [numbers["perSecond"] / mean for numbers, mean in zip(result["burst"], around, strict=True)]


def _compare(name: str, own: Sequence[Numbers], bare: Sequence[Numbers], key: str) -> str:
    """A row. ``bare`` has a measurement before and one after each of ``own``."""
    ratio = median([numbers[key] / mean for numbers, mean in zip(own, _around(bare, key), strict=True)])
    best = max if key == "perSecond" else min
    best_ratio = best(numbers[key] for numbers in own) / best(numbers[key] for numbers in bare)
    return f"| {name} | {_middle(own, key):.4g} | {_middle(bare, key):.4g} | {ratio:.2f} | {best_ratio:.2f} |"


def _rounds(result: Numbers) -> list[str]:
    shares = ", ".join(f"{share:.2f}" for share in _shares_of_bare_calls(result))
    restart, launches, burst, lives = (result[part] for part in ("restart", "launches", "burst", "lives"))
    rows = [
        ("restart: seconds until all are seen", restart, "secondsUntilAllSeen"),
        ("restart: processor seconds until then", restart, "cpuSecondsUntilAllSeen"),
        ("restart: processor seconds until at rest", restart, "cpuSecondsUntilAtRest"),
        ("resident memory at rest, MiB", restart, "rssMiB"),
        ("highest resident memory, MiB", restart, "peakMiB"),
        ("idle: share of a core", result["idle"], "cpuShare"),
        (f"one by one: longest of the first {launches[0]['first']}, ms", launches, "firstMaxMs"),
        ("one by one: p50, ms", launches, "p50Ms"),
        ("one by one: p90, ms", launches, "p90Ms"),
        ("one by one: p99, ms", launches, "p99Ms"),
        ("one by one: operator's processor ms a run", launches, "operatorCpuMsPerRun"),
        ("burst: runs launched a second", burst, "perSecond"),
        ("burst: seconds in which they were created", burst, "createdInSeconds"),
        ("burst: operator's processor ms a run", burst, "operatorCpuMsPerRun"),
        ("burst: API server's processor ms a run", burst, "apiServerCpuMsPerRun"),
        ("whole lives: operator's processor ms a run", lives, "operatorCpuMsPerRun"),
    ]
    return [
        "| | rounds |",
        "| --- | --- |",
        *(f"| {name} | {_all(rounds, key)} |" for name, rounds, key in rows),
        f"| burst: share of bare calls around the round | {shares} |",
        "",
        f"The operator alone, with hardly a run to serve, takes {result['emptyMiB']:g} MiB.",
    ]


def _trouble(trouble: Numbers) -> list[str]:
    return [
        "## An API server in trouble",
        "",
        f"A proxy refused {trouble['refused']} requests with 429 and `Retry-After: 1`, answered {trouble['late']} half "
        f"a second to three seconds late, and let {trouble['passed']} pass, watches included. Of {trouble['runs']} "
        f"runs that were created at once, {trouble['succeededAtFirstAttempt']} succeeded at their first attempt, with "
        f"{trouble['jobsMade']} Jobs, none made twice, in {trouble['seconds']:g} s.",
    ]


def _life(lives: Numbers) -> list[str]:
    kinds = {"two nodes": lives.get("launchByKind"), "one node": lives.get("launchAloneByKind")}
    told = [
        f"A launch of {what}: " + ", ".join(f"{count:g} x `{kind}`" for kind, count in counts.items()) + "."
        for what, counts in kinds.items()
        if counts
    ]
    return [
        "## The calls of a life",
        "",
        *(f"{number}. `{call}`" for number, call in enumerate(lives["oneLife"], 1)),
        *(["", *told] if told else []),
    ]


def _profile(profile: Numbers) -> list[str]:
    titles = {
        "start": "A start with all residents there, until at rest",
        "launches": "Runs that come one by one",
        "burst": "A burst",
        "lives": "Whole lives",
    }
    lines = [
        "## Where the processor time goes",
        "",
        "Samples of the operator's stack in the last round, one in 4 ms of processor time, which costs it about 1% "
        "(`bench/scale/sampled.py`). A "
        "package's share is what it and the standard library below it take; a function's share is that with all that "
        "it calls.",
    ]
    for part, title in titles.items():
        lines += ["", f"### {title}", "", *to_table(profile[part])]
    return [*lines, ""]

"""The steady state for people. Pure."""

from typing import Any

from bench.scale.profile import to_table

Numbers = dict[str, Any]

LAUNCH_MS = 1000
"""The aim for a new run, whatever goes on beside it."""

LAG_SECONDS = 30
"""A log is read every 10 s, and progress is written every 15 s at most."""


def steady_targets(steady: Numbers) -> list[tuple[str, str, str, bool]]:
    """What was measured, the aim, the result, and whether the aim is reached."""
    well, ill, gangs = steady["well"], steady["trouble"], f"{steady['gangs']} gangs of {steady['pods']}"
    lag, disturbed = well["lagSeconds"]["p99"], steady["disturbed"]
    return [
        (
            f"created -> Job stored beside {gangs}, a dead rack and {steady['hung']} hung kubelets: the longest",
            f"< {LAUNCH_MS} ms",
            f"{ill['maxMs']:g} ms",
            ill["maxMs"] < LAUNCH_MS,
        ),
        (f"progress of {gangs} is late by, p99", f"< {LAG_SECONDS} s", f"{lag:g} s", lag < LAG_SECONDS),
        ("gangs disturbed that lost nothing", "0", f"{disturbed}", disturbed == 0),
    ]


def to_lines(steady: Numbers) -> list[str]:
    """A section of docs/benchmarks/operator.md."""
    well, ill = steady["well"], steady["trouble"]
    rows = [
        ("seconds", "seconds"),
        ("new runs of two nodes", "newRuns"),
        ("new run created -> Job stored, p50, ms", "p50Ms"),
        ("the same, p99, ms", "p99Ms"),
        ("the same, the longest, ms", "maxMs"),
        ("operator's processor time, cores", "operatorCores"),
        ("resident memory, MiB", "rssMiB"),
        ("highest resident memory, MiB", "peakMiB"),
        ("writes of a status a second", "statusWritesPerSecond"),
        ("logs asked for and not given", "logsUnread"),
        ("processes that wanted a core (load average)", "load"),
    ]
    kinds = {kind: None for part in (well, ill) for kind in part["callsPerSecond"]}
    return [
        "## A steady state",
        "",
        f"{steady['gangs']} gangs of {steady['pods']} pods run on {steady['nodes']} nodes, and new runs come one by "
        "one. The operator reads the gangs' logs through the API server, which asks played kubelets for them; each "
        f"gang logs a line a second. Then trouble comes: {steady['hung']} kubelets take requests and never answer "
        f"({steady['silentGangs']} gangs have their rank 0 there), and a rack of {steady['rack']} nodes dies with all "
        f"{steady['deadGangs']} gangs on it. A connection to it is never made; after a quarter of the time its nodes "
        "are Unknown and its pods not ready, after two its pods are evicted and stay, after three somebody removes "
        "them. Progress is that of the gangs to which nothing happens; it is late by the seconds since the gang logged "
        "the step that the status tells. There are no controllers, and no pods of the new runs. An operator that "
        f"starts has looked at all gangs after {steady['secondsUntilAllSeen']:g} s.",
        "",
        "| | all is well | in trouble |",
        "| --- | --- | --- |",
        *(f"| {name} | {well[key]:g} | {ill[key]:g} |" for name, key in rows),
        *(
            f"| progress is late by, {share}, s | {well['lagSeconds'][share]:g} | {ill['lagSeconds'][share]:g} |"
            for share in ("p50", "p99", "max")
        ),
        *(
            f"| `{kind}` a second | {well['callsPerSecond'].get(kind, 0):g} | {ill['callsPerSecond'].get(kind, 0):g} |"
            for kind in kinds
        ),
        "",
        f"Of the {steady['deadGangs']} gangs on the rack {steady['deadGangsTold']} have their failure on record at the "
        f"end. Gangs that were disturbed though they lost nothing: {steady['disturbed']}.",
        "",
        "Where the operator's processor time goes while all is well, as further below:",
        "",
        *to_table(steady["profile"]),
    ]

"""One definition, two judges: the API server and pydantic agree on every bound."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lora_api import ClusterLoRARuntimeSpec, LoRAFineTuneSpec, plan_batch
from tests.support.crd import (
    MAXIMAL,
    MAXIMAL_RUNTIME,
    MINIMAL,
    OTHER_RUNTIME,
    OTHERWISE,
    PATHS,
    RUNTIME_PATHS,
    SCHEMA,
    DryRun,
    Spec,
    has,
    paths,
    place,
)

pytestmark = pytest.mark.controlplane


RULE_MESSAGES = tuple(
    rule["message"]
    for node in [SCHEMA, *dict(paths(SCHEMA, "")).values(), *RUNTIME_PATHS.values()]
    if node.get("type") == "object"  # the rules of other nodes are their type or form, and pydantic knows them
    for rule in node.get("x-kubernetes-validations", [])
    if rule["message"] != "set exactly one of name and uri"  # pydantic knows it too
)


PARTLY_KNOWN = ("must be hf://ORG/NAME, s3://", "must be s3://BUCKET/PREFIX, ")
"""Of rules of which pydantic knows a part: it takes file:// for runs outside of a cluster."""


def by_rule_alone(message: str) -> bool:
    """Whether an error is one that pydantic does not know of: a CEL rule, or a list that is a set or a map.

    These are written once, in the CRD. The operator only ever sees what the API server let through.
    """
    return any(text in message for text in RULE_MESSAGES) or "Duplicate value" in message


Create = Callable[[Any], tuple[int, dict[str, Any]]]


def judge(create: Create, model: type[BaseModel], spec: Any) -> tuple[bool, bool, str]:
    """Whether the schema takes ``spec``, whether pydantic does, and what the API server said."""
    code, answer = create(spec)
    causes = (answer.get("details") or {}).get("causes", [])
    # While something is missing or too long, rules are not looked at, which the API server adds as an error.
    served = code == 201 or (
        code == 422
        and all(by_rule_alone(cause["message"]) or "were not checked" in cause["message"] for cause in causes)
    )
    try:
        model.model_validate(spec)
        read = True
    except ValidationError:
        read = False
    if any(text in cause["message"] for text in PARTLY_KNOWN for cause in causes):
        served = read
    return served, read, str(answer.get("message"))


def values(node: dict[str, Any], good: Any) -> Iterator[Any]:
    """Values at, below and above every bound of a node, and of every wrong type."""
    yield from ("x", "", 1, 0, -1, 1.5, True, [], {}, ["x"], {"x": "y"})
    for key in ("minimum", "maximum"):
        if key in node:
            step = 1 if node.get("type") == "integer" else 1e-6
            yield from (node[key] - step, node[key], node[key] + step)
    if node.get("x-kubernetes-int-or-string") or "type" not in node:
        yield from (0.5, 1e30, 1e-7, -0.5, False)
        yield from ("auto", "16", 1024, 1025, "4k", "1e3", "+.5Gi", "-1", "1 Gi", ".", "0x1", "1E", "2Kib", "1" * 33)
    if node.get("type") == "string":
        limit = node.get("maxLength", 8)
        yield from ("a" * limit, "a" * (limit + 1), "\u00e9" * min(limit, 64), "a\n", "a b", "\u00a0", "A-b_c.d")
        if isinstance(good, str):
            yield from (
                good + "\n",
                good + " ",
                good + "\u2028",
                " " + good,
                good.ljust(limit, "a"),
                good.ljust(limit + 1, "a"),
            )
    if node.get("type") == "array" and good:
        # Entries that differ in the text by which they are told apart.
        for count in (node["maxItems"], node["maxItems"] + 1):
            yield [
                {**good[0], "name": f"{good[0]['name']}{'abcdefghij'[n % 10] * (n // 10 + 1)}".upper()}
                if isinstance(good[0], dict) and "value" in good[0] and "name" in good[0]
                else {**good[0], "name": f"n{n}"}
                if isinstance(good[0], dict) and "name" in good[0]
                else good[0]
                if isinstance(good[0], dict)
                else f"{good[0]}{n}"
                for n in range(count)
            ]
    if "additionalProperties" in node:
        for count in (node["maxProperties"], node["maxProperties"] + 1):
            yield {f"example.org/n{n}": "1" for n in range(count)}
    if "properties" in node and isinstance(good, dict):
        yield {**good, "unknown": 1}
        for name in node["properties"]:
            yield {key: value for key, value in good.items() if key != name}


def value_at(spec: Any, path: str) -> Any:
    head, _, key = path.partition(":")
    for part in re.findall(r"[^.\[\]]+", head):
        spec = spec[int(part) if part.isdigit() else part]
    return spec[key] if key else spec


Candidate = tuple[Spec, str, Any]
"""(spec, path, value): an interesting value of a field, to be placed in an otherwise good spec."""


def candidates(nodes: Mapping[str, dict[str, Any]], good: Spec, otherwise: Spec) -> list[Candidate]:
    cases: list[Candidate] = []
    for path, node in nodes.items():
        spec = good if has(good, path) else otherwise
        where = f"{path}{next(iter(value_at(spec, path[:-1])))}" if path.endswith(":") else path
        cases += [(spec, where, value) for value in values(node, value_at(spec, where))]
    return cases


CANDIDATES = candidates(PATHS, MAXIMAL, OTHERWISE)
# The others are those of a run, by one definition.
OF_A_RUNTIME_ALONE = {
    path: node
    for path, node in RUNTIME_PATHS.items()
    if path.startswith("podTemplate.env") or not path.startswith(("podTemplate.", "podTemplate:", "checkpoint."))
}
RUNTIME_CANDIDATES = candidates(OF_A_RUNTIME_ALONE, MAXIMAL_RUNTIME, OTHER_RUNTIME)


def compare(create: Create, model: type[BaseModel], cases: list[Candidate]) -> tuple[int, list[str]]:
    """How many of ``cases`` both take, and those of which only one does."""
    taken, different = 0, []
    for spec, path, value in cases:
        served, read, message = judge(create, model, place(spec, path, value))
        taken += served and read
        if served != read:
            different.append(f"{path} = {str(value)[:60]!r}: API server {served}, pydantic {read}: {message[:200]}")
    return taken, different


def test_every_bound_is_the_same_for_the_api_server_and_for_pydantic(dry: DryRun) -> None:
    assert len(CANDIDATES) > 1000
    taken, different = compare(dry.create_run, LoRAFineTuneSpec, CANDIDATES)
    assert different == []
    assert 200 < taken < len(CANDIDATES) - 200


def test_every_bound_of_a_runtime_is_the_same_for_both(dry: DryRun) -> None:
    assert len(RUNTIME_CANDIDATES) > 200
    taken, different = compare(dry.create_runtime, ClusterLoRARuntimeSpec, RUNTIME_CANDIDATES)
    assert different == []
    assert 40 < taken < len(RUNTIME_CANDIDATES) - 40


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([case for case in CANDIDATES if case[0] is MAXIMAL]), min_size=1, max_size=4))
def test_the_two_agree_on_several_changes_at_once(dry: DryRun, cases: list[tuple[Spec, str, Any]]) -> None:
    spec: Any = MAXIMAL
    for _, path, value in cases:
        try:
            spec = place(spec, path, value)
        except (TypeError, KeyError, AttributeError, IndexError):
            continue  # an earlier change took away what this one would change
    served, read, message = judge(dry.create_run, LoRAFineTuneSpec, spec)
    assert served == read, message


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 65536), st.integers(1, 64), st.integers(1, 16), st.integers(0, 16))
def test_the_advice_on_batch_sizes_is_the_trainers(dry: DryRun, size: int, micro: int, nodes: int, gpus: int) -> None:
    spec = {
        **MINIMAL,
        "training": {"maxSteps": 1, "globalBatchSize": size, "microBatchSize": micro},
        "parallelism": {"nodes": nodes, "gpusPerNode": gpus},
    }
    code, answer = dry.create_run(spec)
    read = LoRAFineTuneSpec.model_validate(spec)
    if code == 201:
        assert plan_batch(read.training, read.parallelism).global_batch_size == size
        return
    assert code == 422
    with pytest.raises(ValueError, match="multiple of") as error:
        plan_batch(read.training, read.parallelism)
    assert str(error.value).partition("; the nearest: ")[2] == answer["message"].partition("; the nearest: ")[2]

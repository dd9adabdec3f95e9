"""Whether the adapter in a pod's last words can be that of its run."""

from typing import Any

import pytest

from lora_api.status import AdapterStatus
from lora_operator.status.claims import find_foreign
from tests.unit.operator.builders import a_run

DIGEST = "sha256:" + "a" * 64
STORE = "s3://models/adapters"
URI = f"{STORE}/team/tickets/sha256-{'a' * 64}"
OWN: dict[str, Any] = {
    "uri": URI, "digest": DIGEST, "version": 3, "servedName": "tickets-v3", "rank": 8, "servingMaxLoraRank": 8,
    "sizeBytes": 10,
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "its own": ({}, STORE, None),
    "its own, of a store with a slash at the end": ({}, f"{STORE}/", None),
    "its own, of a run that takes its store from the trainer": ({}, None, None),
    "no digest": ({"digest": "sha256:ab"}, STORE, "'sha256:ab' is no digest"),
    "the name of another version": (
        {"servedName": "tickets-v4"},
        STORE,
        "is not the name of its version 3, tickets-v3",
    ),
    "another store": ({"uri": URI.replace("models", "others")}, STORE, f"is not {URI}, where this run publishes"),
    "another run's directory": ({"uri": URI.replace("tickets", "other")}, STORE, "where this run publishes"),
    "another run's directory, of an unknown store": ({"uri": URI.replace("tickets", "other")}, None, "publishes"),
    "another merged model": ({"mergedUri": f"{STORE}/team/other/merged"}, STORE, f"{STORE}/team/other/merged is not "),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_believed_where_the_run_publishes(case: str) -> None:
    changes, store, words = CASES[case]
    run = a_run(publish={} if store is None else {"store": store})
    found = find_foreign(run, AdapterStatus.model_validate({**OWN, **changes}))
    assert (found is None) if words is None else (found is not None and words in found)


@pytest.mark.parametrize(("field", "size"), [("digest", 200), ("servedName", 200), ("uri", 500)])
def test_what_a_pod_says_is_quoted_up_to_a_limit(field: str, size: int) -> None:
    found = find_foreign(a_run(publish={"store": STORE}), AdapterStatus.model_validate({**OWN, field: "x" * 900}))
    assert found is not None
    assert found.count("x") == size

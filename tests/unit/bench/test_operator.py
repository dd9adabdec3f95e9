"""The pure parts of the operator's bench."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.scale.audit import Audit, by_run, launch_calls, life_calls
from bench.scale.profile import summarize
from bench.scale.residents import Template


def entry(verb: str, resource: str, name: str, *, user: str = "lora-operator", code: int = 200, **more: Any) -> str:
    resource, _, subresource = resource.partition("/")
    reference = {"resource": resource, "namespace": "team", "name": name, "subresource": subresource}
    document = {
        "user": {"username": user},
        "userAgent": "lora-operator/v1alpha1 (linux)",
        "verb": verb,
        "objectRef": reference,
        "responseStatus": {"code": code},
        "requestReceivedTimestamp": "2026-11-25T04:00:00.000000Z",
        "stageTimestamp": "2026-11-25T04:00:00.250000Z",
        **more,
    }
    return json.dumps(document, separators=(",", ":")) + "\n"


LIFE = (
    ("create", "services", "a-b-1", 201),
    ("create", "jobs", "a-b-1", 201),
    ("patch", "lorafinetunes/status", "a-b", 409),
    ("patch", "lorafinetunes/status", "a-b", 200),
    ("create", "events", "a-b.01234567.1.started", 201),
    ("get", "pods/log", "a-b-1-0-abcde", 200),
    ("patch", "lorafinetunes/status", "a-b", 200),
    ("watch", "jobs", "", 200),
)


def test_calls_are_counted_by_the_run_that_they_are_about(tmp_path: Path) -> None:
    file = tmp_path / "audit.log"
    file.write_text("".join(entry(verb, resource, name, code=code) for verb, resource, name, code in LIFE))
    with closing(Audit(file)) as audit:
        calls = by_run(audit.read())
    assert set(calls) == {"a-b"}
    assert len(calls["a-b"]) == 7
    assert [call.resource for call in launch_calls(calls["a-b"])] == [
        "services", "jobs", "lorafinetunes/status", "lorafinetunes/status",
    ]  # fmt: skip
    assert len(life_calls(calls["a-b"])) == 5
    assert round(calls["a-b"][0].answered - calls["a-b"][0].received, 3) == 0.25


def test_a_log_is_followed_while_it_grows_and_when_it_is_moved_aside(tmp_path: Path) -> None:
    file = tmp_path / "audit.log"
    line = entry("create", "lorafinetunes", "one", user="bench", code=201)
    file.write_text(entry("get", "jobs", "other", user="someone") + line[:20])
    with closing(Audit(file)) as audit:
        assert audit.read() == [], "of other users only creations of runs count, and half a line is none"
        with file.open("a") as more:
            more.write(line[20:])
        assert [call.name for call in audit.read()] == ["one"]
        file.rename(tmp_path / "audit-1.log")
        with (tmp_path / "audit-1.log").open("a") as old:
            old.write(line.replace('"one"', '"two"'))
        file.write_text(line.replace('"one"', '"three"'))
        assert [call.name for call in audit.read()] == ["two", "three"]


def test_a_copy_of_a_run_has_names_and_uids_of_its_own() -> None:
    owner = {"uid": "uid-of-run", "name": "run-0-0"}
    run = {"kind": "LoRAFineTune", "metadata": {"name": "run-0-0", "namespace": "team-0", "uid": "uid-of-run"}}
    job: dict[str, Any] = {"kind": "Job", "metadata": {"name": "run-0-0-1", "namespace": "team-0", "uid": "uid-of-job"}}
    job["metadata"] |= {"ownerReferences": [owner], "resourceVersion": "12"}
    template = Template("run-0-0", "team-0", (run, job))
    first, second = (dict(template.copies(name, "team-7")) for name in ("finished-1", "finished-2"))
    assert set(first) == {
        "/registry/lorafinetune.io/lorafinetunes/team-7/finished-1",
        "/registry/jobs/team-7/finished-1-1",
    }
    copies = [json.loads(text) for text in first.values()]
    assert copies[1]["metadata"]["ownerReferences"] == [{"uid": copies[0]["metadata"]["uid"], "name": "finished-1"}]
    assert "resourceVersion" not in copies[1]["metadata"]
    uids = {json.loads(text)["metadata"]["uid"] for texts in (first, second) for text in texts.values()}
    assert len(uids | {"uid-of-run", "uid-of-job"}) == 6


def test_the_standard_library_works_for_its_caller() -> None:
    ours = "/x/operator/lora_operator/kube.py:_call_json"
    samples = [
        (3, ("/usr/lib/python3.11/json/decoder.py:decode", ours, "/x/operator/lora_operator/queue.py:_look")),
        (1, ("/v/site-packages/kopf/_core/reactor/queueing.py:worker", "/usr/lib/python3.11/asyncio/events.py:_run")),
    ]
    summary = summarize(samples)
    assert summary["areas"] == {"lora_operator.kube": 0.75, "kopf": 0.25}
    assert summary["functions"] == {"kube._call_json": 0.75, "queue._look": 0.75}

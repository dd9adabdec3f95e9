"""Models and datasets of a model hub, over its real protocol and with its real client libraries.

The libraries read their settings when they are imported, so each of these runs is a process of its own.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_api.failures import RULES, FailureClass
from lora_api.run import RunSpec
from tests.support.hub import Hub, run_hub
from tests.support.seaweed import free_ports
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import SOURCES, Launched

Launch = Callable[..., Launched]
Make = Callable[..., RunSpec]
Fetch = Callable[..., dict[str, Any]]

FETCH = """
import json, sys
from pathlib import Path
from lora_api.sources import BaseModelSource, DataSource
from lora_trainer.errors import classify
from lora_trainer.sources import fetch_data, fetch_model
kind, target = sys.argv[1], Path(sys.argv[2])
try:
    if kind == "model":
        files = sorted(fetch_model(BaseModelSource.model_validate_json(sys.argv[3]), target).iterdir())
    else:
        files = fetch_data(DataSource.model_validate_json(sys.argv[3]), target)
except Exception as error:
    print(json.dumps({"class": classify(error), "message": str(error)}))
else:
    print(json.dumps({"files": [str(file) for file in files]}))
"""


@pytest.fixture(scope="module")
def repositories(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of repositories, as their authors have them."""
    root = tmp_path_factory.mktemp("repositories")
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "records/*.jsonl"}]}]}
    for name, files in {"model": model, "changed": model, "data": data}.items():
        (root / name).mkdir()
        for file in files.iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    (root / "model" / "pytorch_model.bin").write_bytes(b"pickled weights")
    (root / "model" / "training_args.pt").write_bytes(b"pickled settings")
    (root / "changed" / "generation_config.json").write_text('{"eos_token_id": 3}')
    (root / "data" / "README.md").write_text("# Two splits\n")
    (root / "data" / "eval.jsonl").rename(root / "data" / "test.jsonl")
    write_rows(root / "new-data" / "records" / "a.jsonl", make_rows(5, start=500))
    (root / "new-data" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# One split\n")
    write_rows(root / "broken" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    with (root / "broken" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a",\n')
    return {directory.name: directory for directory in root.iterdir()}


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    with run_hub() as hub:
        hub.add("models", "team/tiny", {"main": repositories["model"], "v2": repositories["changed"]})
        hub.add("models", "team/gated", {"main": repositories["model"]}, {"hf_owner"}, gated=True)
        hub.add("models", "team/private", {"main": repositories["model"]}, {"hf_owner"})
        hub.add("datasets", "team/rows", {"main": repositories["data"], "v2": repositories["new-data"]})
        hub.add("datasets", "team/gated", {"main": repositories["data"]}, {"hf_owner"}, gated=True)
        hub.add("datasets", "team/broken", {"main": repositories["broken"]})
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return hub.environment | {"HF_HOME": str(tmp_path / "hf"), "LORA_STORE_RETRY_SECONDS": "1"}


@pytest.fixture
def fetch(environment: dict[str, str], tmp_path: Path) -> Fetch:
    """Fetches one source, as a pod does before it trains; returns the files, or class and message of the failure."""

    def fetch(kind: str, source: dict[str, str], **changes: str) -> dict[str, Any]:
        paths = os.pathsep.join(map(str, SOURCES))
        env = {**os.environ, **environment, **changes, "PYTHONPATH": paths}
        command = [sys.executable, "-W", "error", "-c", FETCH, kind, str(tmp_path / "fetched"), json.dumps(source)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return fetch


def read_rows(file: str) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


def test_model_and_data_of_the_hub_train_and_no_pickle_file_is_fetched(
    hub: Hub, environment: dict[str, str], make_run: Make, launch: Launch
) -> None:
    dataset = {"train": {"uri": "hf://team/rows"}, "eval": {"uri": "hf://team/rows", "split": "test"}}
    pod = launch(make_run(baseModel={"uri": "hf://team/tiny"}, dataset=dataset), **environment)
    assert pod.wait() == 0, pod.log.read_text()[-5000:]
    assert pod.words.adapter is not None
    assert pod.words.adapter.version == 1
    assert sorted(pod.losses) == [1, 2, 3, 4]
    fetched = hub.fetched()
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.jsonl", "test.jsonl"} <= set(fetched)
    assert len(fetched) == len(set(fetched)), "a file was fetched twice"
    assert not [name for name in fetched if name.endswith((".bin", ".pt"))]


def test_a_revision_is_honoured(hub: Hub, fetch: Fetch) -> None:
    commit = hub.repositories["models", "team/tiny"].revisions["v2"].commit
    for revision, end in (("main", 2), ("v2", 3), (commit, 3)):
        files = fetch("model", {"uri": "hf://team/tiny", "revision": revision})["files"]
        config = next(Path(file) for file in files if file.endswith("generation_config.json"))
        assert json.loads(config.read_text())["eos_token_id"] == end
    old = fetch("data", {"uri": "hf://team/rows"})["files"]
    assert read_rows(old[0]) == make_rows(48)
    new = fetch("data", {"uri": "hf://team/rows", "revision": "v2"})["files"]
    assert read_rows(new[0]) == make_rows(5, start=500)


MODEL, DATA = "model", "data"
NOT_FOUND, DENIED = FailureClass.MODEL_NOT_FOUND, FailureClass.AUTH_DENIED
REFUSED: dict[str, tuple[str, dict[str, str], str, FailureClass, str]] = {
    "a model that is not there": (MODEL, {"uri": "hf://team/none"}, "", NOT_FOUND, "no such repository"),
    "a model that is not there, for somebody who is known": (
        MODEL, {"uri": "hf://team/none"}, "hf_owner", NOT_FOUND, "no such repository"),
    "a revision of a model that is not there": (
        MODEL, {"uri": "hf://team/tiny", "revision": "v9"}, "", NOT_FOUND, "revision v9: there is no such revision"),
    "a name that no repository can have": (MODEL, {"uri": "hf://a/b/c"}, "", FailureClass.BAD_SPEC, "a/b/c"),
    "a private model": (MODEL, {"uri": "hf://team/private"}, "hf_stranger", NOT_FOUND, "it is private and HF_TOKEN"),
    "a gated model without a token": (MODEL, {"uri": "hf://team/gated"}, "", DENIED, "Accept its terms"),
    "a gated model with a stranger's token": (
        MODEL, {"uri": "hf://team/gated"}, "hf_stranger", DENIED, "not in the authorized list"),
    "a token that is none": (MODEL, {"uri": "hf://team/tiny"}, "hf_typo", DENIED, "Invalid credentials"),
    "a dataset that is not there": (DATA, {"uri": "hf://team/none"}, "", NOT_FOUND, "no such repository"),
    "a revision of a dataset that is not there": (
        DATA, {"uri": "hf://team/rows", "revision": "v9"}, "", NOT_FOUND, "revision v9"),
    "a split that is not there": (
        DATA, {"uri": "hf://team/rows", "split": "dev"}, "", NOT_FOUND, "['train', 'test']"),
    "a gated dataset with a stranger's token": (
        DATA, {"uri": "hf://team/gated"}, "hf_stranger", DENIED, "Accept its terms"),
    "a dataset with a token that is none": (DATA, {"uri": "hf://team/rows"}, "hf_typo", DENIED, "Invalid credentials"),
    "a dataset that is no JSON": (DATA, {"uri": "hf://team/broken"}, "", FailureClass.BAD_DATA, "JSON parse error"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_said_with_its_uri(case: str, fetch: Fetch) -> None:
    kind, source, token, expected, words = REFUSED[case]
    answer = fetch(kind, source, HF_TOKEN=token)
    assert answer["class"] == expected, answer
    assert source["uri"] in answer["message"]
    assert words in answer["message"]


def test_a_gated_repository_opens_to_the_right_token_which_no_other_host_sees(hub: Hub, fetch: Fetch) -> None:
    assert "files" in fetch("model", {"uri": "hf://team/gated"}, HF_TOKEN="hf_owner")
    assert "files" in fetch("data", {"uri": "hf://team/gated"}, HF_TOKEN="hf_owner")
    assert {request.token for request in hub.requests if request.path.startswith("/lfs/")} == {None}


def test_the_exit_code_tells_what_the_hub_said(
    hub: Hub, environment: dict[str, str], make_run: Make, launch: Launch
) -> None:
    missing = launch(make_run(baseModel={"uri": "hf://team/none"}), **environment)
    gated = launch(make_run(baseModel={"uri": "hf://team/gated"}), **environment)
    assert (missing.wait(), gated.wait()) == (66, 67)
    assert "hf://team/none" in missing.words.message
    assert "hf://team/gated" in gated.words.message
    assert "HF_TOKEN" in RULES[FailureClass.AUTH_DENIED].remedy


@pytest.mark.parametrize("kind", [MODEL, DATA])
def test_a_hub_that_is_down_is_given_up_in_bounded_time_and_may_be_tried_again(
    kind: str, hub: Hub, fetch: Fetch
) -> None:
    source = {"uri": "hf://team/tiny" if kind == MODEL else "hf://team/rows"}
    gone = fetch(kind, source, HF_ENDPOINT=f"http://127.0.0.1:{free_ports(1)[0]}")
    hub.fail_with = 503
    failing = fetch(kind, source)
    for answer in (gone, failing):
        assert answer["class"] == FailureClass.STORE_UNAVAILABLE, answer
        assert source["uri"] in answer["message"]
        assert "within 1 s" in answer["message"]
    assert len([request for request in hub.requests if request.path.startswith("/api/")]) > 1, "not tried again"
    hub.fail_with = None
    assert "files" in fetch(kind, source)


def test_a_hub_that_never_answers_is_not_waited_for_without_end(
    hub: Hub, fetch: Fetch, environment: dict[str, str]
) -> None:
    hub.silent = threading.Event()
    try:
        answer = fetch(MODEL, {"uri": "hf://team/tiny"}, HF_HUB_ETAG_TIMEOUT="1")
        # The libraries pass no timeout where they list files.
        code = (
            "import httpx2; from lora_trainer import hub; from huggingface_hub.utils import get_session\n"
            "hub._limit_waits()\n"
            "try: get_session().get(hub.constants.ENDPOINT + '/api/models/team/tiny/tree/main', timeout=None)\n"
            "except httpx2.ReadTimeout: print('given up')"
        )
        env = os.environ | environment | {"PYTHONPATH": os.pathsep.join(map(str, SOURCES)), "HF_HUB_ETAG_TIMEOUT": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    finally:
        hub.silent.set()
    assert answer["class"] == FailureClass.STORE_UNAVAILABLE, answer
    assert done.stdout == "given up\n", done.stderr


def test_offline_takes_what_is_in_the_cache_and_asks_nobody(
    hub: Hub, fetch: Fetch, environment: dict[str, str]
) -> None:
    sources = ((MODEL, {"uri": "hf://team/tiny"}), (DATA, {"uri": "hf://team/rows"}))
    for kind, source in sources:
        answer = fetch(kind, source, HF_HUB_OFFLINE="1")
        assert answer["class"] == FailureClass.MODEL_NOT_FOUND
        assert "HF_HUB_OFFLINE" in answer["message"]
    fill = "import datasets as d, huggingface_hub as h; h.snapshot_download('team/tiny'); d.load_dataset('team/rows')"
    subprocess.run([sys.executable, "-c", fill], env=os.environ | environment, check=True, capture_output=True)
    hub.requests.clear()
    for kind, source in sources:
        assert "files" in fetch(kind, source, HF_HUB_OFFLINE="1")
    assert hub.requests == []

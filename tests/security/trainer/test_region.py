"""A region that is a server."""

import socket

import pytest

from lora_trainer.errors import BadSpecError
from lora_trainer.store import Store, read_region


@pytest.mark.parametrize("region", ["x@{address}/#", "{address}/", "eu\n", "a.b", "x" * 65])
def test_a_region_that_names_another_server(monkeypatch: pytest.MonkeyPatch, region: str) -> None:
    """Attack: whoever writes the Secret puts a server of their own into AWS_REGION, a part of AWS's host name.

    Models, records and adapters would go to it, past endpoints of the runtime and its prefixes.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
        monkeypatch.setenv("AWS_REGION", region.format(address=address))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        server.settimeout(0.0)
        with pytest.raises(BadSpecError, match="AWS_REGION"):
            Store("s3://models/adapters", retry_seconds=0).get("manifest.json")
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("region", ["eu-central-1", "us-gov-west-1", "auto", "US"])
def test_a_region_of_any_store_is_taken(region: str) -> None:
    assert read_region({"AWS_REGION": region}) == region

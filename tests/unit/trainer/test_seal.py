"""Names of the messages between ranks."""

import hashlib
import itertools

import pytest
from pydantic import ValidationError

from lora_api.run import RunSpec
from lora_trainer.seal import Seal, make_seal

KEY = "0123456789abcdef" * 4
DOCUMENT = {
    "namespace": "team",
    "name": "support",
    "uid": "uid-1",
    "baseModel": {"uri": "s3://models/m"},
    "dataset": {"train": {"uri": "s3://data/t.jsonl"}},
    "training": {"maxSteps": 18},
    "publish": {"store": "s3://adapters"},
}


def seal(**changes: object) -> Seal:
    return make_seal(RunSpec.model_validate({**DOCUMENT, "controlKey": KEY, **changes}))


def test_whatever_a_message_says_is_in_its_name() -> None:
    names = [
        seal().name("stop", 1),
        seal().name("left", 1),
        seal().name("stop", 2),
        seal().name("stop", 1, "BadSpec"),
        seal(attempt=2).name("stop", 1),
        seal(uid="uid-2").name("stop", 1),
        seal(controlKey=KEY[::-1]).name("stop", 1),
        seal(controlKey=None).name("stop", 1),
        seal().name("beat", 1, "12"),
        seal().name("beat", 11, "2"),
    ]
    assert all(one != other for one, other in itertools.combinations(names, 2))
    assert seal().name("beat", 1, "12") == names[8]


def test_a_name_is_an_hmac_and_does_not_show_the_key() -> None:
    """The tag is RFC 2104's, so it is worked out here with nothing but SHA-256."""
    padded = bytes.fromhex(KEY).ljust(64, b"\0")
    inner, outer = (bytes(byte ^ mask for byte in padded) for mask in (0x36, 0x5C))
    said = b'["uid-1", 1, "beat", 1, "12"]'
    tag = hashlib.sha256(outer + hashlib.sha256(inner + said).digest()).hexdigest()
    assert seal().name("beat", 1, "12") == f"beat/{tag}"
    assert KEY not in repr(seal())
    assert str(bytes.fromhex(KEY)) not in repr(seal())


def test_a_document_without_a_key_has_no_secret() -> None:
    assert seal().is_secret
    assert not seal(controlKey=None).is_secret


@pytest.mark.parametrize("key", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64])
def test_a_key_is_32_bytes_in_hex(key: str) -> None:
    with pytest.raises(ValidationError):
        seal(controlKey=key)

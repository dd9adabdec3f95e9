"""Names of the messages between the ranks of a run, which only who has the run's key can write or look for.

A message is the existence of a key in the gang's TCPStore. The key's name is the HMAC-SHA256 of all that the message
says: the attempt of the run, the word, the rank and the content. Its value is empty, and nobody reads it. A TCPStore
needs that: every client of it lists and reads all keys, so a password in a name or a value protects nothing (tried,
torch 2.13); and it gives a value whole, without a word on its length, and values grow without limit by ``append``.

- Without the key of the run nobody can make a name, and a name of another attempt is none of this one.
- A name that was listed can be set again. That says what was said already, in the same attempt.
- Nothing that others wrote is read or enumerated, so neither long values nor many keys reach a rank that looks.
- No digest is compared here: the store looks names up, and what it takes for a name that is not there yet tells
  nothing about it.

What remains to one who reaches the TCPStore, and is for the run's NetworkPolicy to prevent: deleting keys (a message
may be lost), filling the memory of rank 0, and writing the keys by which the process group itself meets, which torch
does not authenticate, as gloo and NCCL do not authenticate their connections.
"""

import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Literal

from lora_api.run import RunSpec

Word = Literal["stop", "asked", "beat", "left", "lost", "said", "done"]


@dataclass(frozen=True)
class Seal:
    """The names of one attempt's messages. Without a key anybody can compute them (``is_secret``)."""

    uid: str
    attempt: int
    key: bytes = field(default=b"", repr=False)

    @property
    def is_secret(self) -> bool:
        """Whether the run document has a key."""
        return bool(self.key)

    def name(self, word: Word, rank: int, content: str = "") -> str:
        """Key of the message in which ``rank`` says ``word`` and ``content``."""
        said = json.dumps([self.uid, self.attempt, word, rank, content])
        return f"{word}/{hmac.new(self.key, said.encode(), hashlib.sha256).hexdigest()}"


def make_seal(run: RunSpec) -> Seal:
    """The seal of the attempt that ``run`` is for."""
    return Seal(run.uid, run.attempt, bytes.fromhex(run.control_key or ""))

"""Keys that the ranks of a gang sign their control messages with: random, one for each attempt."""

import secrets

from lora_api import LoRAFineTune
from lora_operator.objects import Key

_BYTES = 32


class ControlKeys:
    """Makes keys, and remembers that of each run's current attempt in memory alone.

    A ConfigMap that somebody deletes while pods start is made again: with another key its pods would not understand
    those that have started. An operator that is started in between has no other choice.
    """

    def __init__(self) -> None:
        self._keys: dict[Key, tuple[str, int, str]] = {}

    def of(self, run: LoRAFineTune, attempt: int) -> str:
        """The key of ``attempt``."""
        key = run.metadata.namespace, run.metadata.name
        uid, known, value = self._keys.get(key, ("", 0, ""))
        if (uid, known) != (run.metadata.uid, attempt):
            value = secrets.token_hex(_BYTES)
            self._keys[key] = run.metadata.uid, attempt, value
        return value

    def forget(self, key: Key) -> None:
        """The run has ended, or is gone."""
        self._keys.pop(key, None)

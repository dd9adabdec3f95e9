"""Keys that the ranks of a gang sign their control messages with: random, one for each attempt."""

import secrets

_BYTES = 32


def draw_control_key() -> str:
    """A key for one attempt, in hex.

    Nobody remembers it: it is in the Job of its attempt, and that is made once. Of two operators that make the same
    Job at the same time, one gets that of the other, with the key of the other.
    """
    return secrets.token_hex(_BYTES)

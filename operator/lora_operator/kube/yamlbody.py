"""Bodies of server-side apply, which the API server reads as YAML. Pure.

JSON is YAML but for strings: YAML knows no pair of escapes for one character, which is how JSON writes those beyond
16 bits (gloo's errors end with such a one), and allows raw characters only where they can be printed and end no line.
"""

import json
import re
from typing import Any

CONTENT_TYPE = "application/apply-patch+yaml; charset=utf-8"
"""The client library makes JSON of a body whose type has no charset."""

_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""What JSON may hold as it is and YAML may not (sections 5.1 and 5.4 of the specification, also of YAML 1.1)."""


def encode(body: dict[str, Any]) -> bytes:
    """``body`` as JSON that is YAML too. Half a surrogate pair, which is no character, becomes U+FFFD."""
    return _UNPRINTABLE.sub(_escape, json.dumps(body, ensure_ascii=False)).encode()


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= character <= "\udfff" else f"\\u{ord(character):04x}"

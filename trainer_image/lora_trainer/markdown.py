"""Texts of others in a page of Markdown, each of which stays what it is: a name, and not a heading, a link or HTML."""

import re
import shlex

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|&~])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
"""Ends of lines, characters without a form, and those that turn the direction of what follows."""


def one_line(text: str) -> str:
    """``text`` without anything that ends a line or cannot be seen."""
    return " ".join(_CONTROL.sub(" ", text).split())


def inline(text: str) -> str:
    """``text`` as it is, in a heading or a sentence (CommonMark, "Backslash escapes")."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """``text`` in a code span, which is as long as it must be to hold its backticks (CommonMark, "Code spans")."""
    shown = one_line(text) or " "
    longest = max(map(len, re.findall("`+", shown)), default=0)
    mark = "`" * (longest + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{mark}{space}{shown}{space}{mark}"


def shell_word(text: str) -> str:
    """``text`` as one word of a command line, on one line."""
    return shlex.quote(one_line(text))

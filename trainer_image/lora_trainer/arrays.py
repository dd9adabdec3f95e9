"""A .json file that is one array, an element at a time: what is held in memory is one record, and not the file."""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

PIECE = 256 * 1024

_WHITE = " \t\r\n"


class NoArrayError(Exception):
    """The text is no array, or its end is missing. ``number`` is that of the element, from 1; 0 is the beginning."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class ElementTooLongError(Exception):
    """Element ``number`` is longer than the limit."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def read_array(file: BinaryIO, limit: int) -> Iterator[object]:
    """The elements of the array in ``file``, none of which has more than ``limit`` characters.

    Raises:
        NoArrayError: it is none.
        ElementTooLongError: an element is longer.
        UnicodeDecodeError: it is not UTF-8.
    """
    text = _Text(file, limit)
    if text.next_character() != "[":
        raise NoArrayError(0, "must be one array of objects; a file with one object a line is a .jsonl")
    text.skip(1)
    number = 0
    if text.next_character() == "]":
        text.skip(1)
    else:
        while True:
            number += 1
            yield text.read_value(number)
            mark = text.next_character()
            text.skip(1)
            if mark == "]":
                break
            if mark != ",":
                raise NoArrayError(number, "is not JSON: neither a comma nor the end of the array follows it")
    if text.next_character():
        raise NoArrayError(number, "is not JSON: something follows the array")


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text may be right as far as it goes: strings and words are reported where they begin."""
    return error.msg.startswith("Unterminated string") or error.pos + len("-Infinity") >= len(error.doc)


class _Text:
    """What was read and not used yet."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._held, self._at, self._ended = "", 0, False

    def next_character(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in _WHITE:
                self._at += 1
            if self._at < len(self._held) or self._ended:
                return self._held[self._at : self._at + 1]
            self._read(PIECE)

    def skip(self, characters: int) -> None:
        self._at += characters

    def read_value(self, number: int) -> object:
        """The next value. It is taken for whole when something follows it."""
        self.next_character()
        while True:
            try:
                value, end = self._scan(self._held, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not _may_be_cut(error):
                    raise NoArrayError(number, f"is not JSON: {error.msg}") from error
                end = len(self._held)
            except (ValueError, RecursionError) as error:
                raise NoArrayError(number, f"is not JSON: {error}") from error
            if end - self._at > self._limit:
                raise ElementTooLongError(number)
            if end < len(self._held) or self._ended:
                self._at = end
                return value
            self._read(max(PIECE, end - self._at))  # as much again, so that a long value is not scanned too often

    def _read(self, size: int) -> None:
        data = self._file.read(size)
        self._ended = not data
        self._held, self._at = self._held[self._at :] + self._decode(data, final=not data), 0

"""Annotation files of gigabytes: the items of the lists in a JSON object, one by one, without the whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fgvczoo.errors import FgvczooError

_ENDS = tuple(",]} \t\r\n")  # what follows a whole number
_CHUNK, _MOST = 1 << 22, 1 << 27  # characters that are read at once, and of one item


def json_items(file: Path) -> Iterator[tuple[str, Any]]:
    """(key, item) of each item of the lists in the object that a file holds; (key, value) where a value is no list. Of
    a file that holds a list, ("", item).

    `FgvczooError` where the file is missing, cut or something else.
    """
    try:
        with file.open(encoding="utf-8-sig") as handle:
            yield from _Scanner(handle).items()
    except FileNotFoundError:
        raise FgvczooError(f"{file} is missing; unpack the archive again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FgvczooError(f"{file}: no whole JSON object of lists ({error}); get it again") from None


class _Scanner:
    def __init__(self, handle: Any) -> None:
        self.handle, self.text, self.at = handle, "", 0
        self.decode = json.JSONDecoder().raw_decode

    def items(self) -> Iterator[tuple[str, Any]]:
        if self.peek() == "[":
            yield from (("", item) for item in self.list())
            return
        self.expect("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise ValueError("a key that is no text")
            self.expect(":")
            if self.peek() == "[":
                yield from ((key, item) for item in self.list())
            else:
                yield key, self.value()
            if self.peek() != "}":
                self.expect(",")

    def list(self) -> Iterator[Any]:
        self.expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.expect(",")
        self.expect("]")

    def peek(self) -> str:
        """The next character that is not blank."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                raise ValueError("it is cut")

    def expect(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise ValueError(f"{found!r} where {character!r} is expected")
        self.at += 1

    def value(self) -> Any:
        self.peek()
        if self.at > _CHUNK:
            self.text, self.at = self.text[self.at :], 0
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except ValueError:
                if len(self.text) - self.at > _MOST or not self.more():
                    raise
                continue
            # A number at the end of what was read may go on.
            whole = self.text[end : end + 1] in _ENDS if isinstance(value, (int, float)) else True
            if whole or len(self.text) - self.at > _MOST or not self.more():
                self.at = end
                return value

    def more(self) -> bool:
        """Reads on; whether there was more."""
        chunk = self.handle.read(_CHUNK)
        self.text += chunk
        return bool(chunk)

"""MATLAB files of version 5 (`save -v6` and `-v7`), as data sets carry their annotations in them.

A reader of our own since that of scipy is compiled code that trusts its input: a damaged file ends the process. Here
every size is checked against the bytes that are there. Numbers, texts, cells and structures are read; objects,
functions and sparse matrices are refused.

Source: MathWorks, MAT-File Format (Level 5), tables 1-1 and 1-3.
"""

from __future__ import annotations

import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.errors import FgvczooError

MOST_BYTES = 1 << 28  # of an uncompressed variable
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCTURE, _TEXT, _FIRST_NUMBER, _LAST_NUMBER = 1, 2, 4, 6, 15
_COMPLEX = 0x0800


class _Damaged(Exception):
    """Bytes that are no such file."""


def read_mat(file: Path, variable: str) -> Any:
    """A variable of a MATLAB file; `FgvczooError` where the file is missing, another or damaged, or has no such name.

    A number is a float or an int; an array of numbers an array of its shape; a text a str; an array of cells a list; a
    structure, or an array of them, a dict of lists, one value for each structure. Lists are in the order of columns.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise FgvczooError(f"{file} is missing; get it again") from None
    except OSError as error:
        raise FgvczooError(f"{file}: cannot be read ({error})") from None
    try:
        return _File(data).variable(variable)
    except RecursionError:
        reason = "cells in cells without end"
    except (_Damaged, zlib.error, UnicodeDecodeError) as error:
        reason = str(error)
    raise FgvczooError(f"{file}: no MATLAB file of version 5 to 7 with {variable} ({reason}); get it again")


class _File:
    def __init__(self, data: bytes) -> None:
        if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise _Damaged("its first bytes are others")
        self.order = "<" if data.startswith(b"IM", 126) else ">"
        self.tag = struct.Struct(f"{self.order}II")
        self.data = memoryview(data)

    def variable(self, wanted: str) -> Any:
        at, there = 128, []
        while at < len(self.data):
            kind, content, at = self.element(self.data, at)
            if kind == _COMPRESSED:
                stream = zlib.decompressobj()
                inner = memoryview(stream.decompress(content, MOST_BYTES))
                if not stream.eof:
                    raise _Damaged(f"a variable that is cut, or of more than {MOST_BYTES} bytes")
                kind, content, _ = self.element(inner, 0)
            if kind != _MATRIX:
                raise _Damaged(f"an element of kind {kind}")
            if content and (name := self.header(content)[3]) == wanted:
                return self.value(content)
            there.append(name if content else "")
        raise _Damaged(f"it has {', '.join(map(repr, there[:5])) or 'no variable'}")

    def element(self, data: memoryview, at: int) -> tuple[int, memoryview, int]:
        """The kind of the element at a place, its bytes, and the place of the next one."""
        if at + 8 > len(data):
            raise _Damaged("it is cut")
        kind, size = self.tag.unpack_from(data, at)
        start, stop = at + 8, at + 8 + size
        if kind >> 16:  # up to four bytes lie in the tag itself
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise _Damaged(f"{size} bytes in a tag")
            start, stop, following = at + 4, at + 4 + size, at + 8
        else:
            following = stop if kind == _COMPRESSED else -(-stop // 8) * 8
        if stop > len(data):
            raise _Damaged("it is cut")
        return kind, data[start:stop], following

    def header(self, data: memoryview) -> tuple[int, int, tuple[int, ...], str, int]:
        """Of a matrix: its class, its flags, its shape, its name, and the place of what follows."""
        _, flags, at = self.element(data, 0)
        _, shape, at = self.element(data, at)
        _, name, at = self.element(data, at)
        if len(flags) != 8 or len(shape) % 4:
            raise _Damaged("a matrix without a shape")
        word = self.tag.unpack(flags)[0]
        sides = tuple(np.frombuffer(shape, f"{self.order}i4").tolist())
        if min(sides, default=-1) < 0:
            raise _Damaged("a matrix without a shape")
        return word & 0xFF, word, sides, bytes(name).decode("latin-1"), at

    def value(self, data: memoryview) -> Any:
        if not data:
            return np.empty((0, 0))
        kind, flags, shape, _, at = self.header(data)
        if kind in (_CELL, _STRUCTURE):
            names: list[str] = []
            if kind == _STRUCTURE:
                names, at = self.fields(data, at)
            count = prod(shape) * max(len(names), 1)
            if count > (len(data) - at) // 8:
                raise _Damaged("it is cut")
            values = []
            for _ in range(count):
                inner, content, at = self.element(data, at)
                if inner != _MATRIX:
                    raise _Damaged(f"a cell of kind {inner}")
                values.append(self.value(content))
            return {name: values[place :: len(names)] for place, name in enumerate(names)} if names else values
        inner, content, _ = self.element(data, at)
        if kind == _TEXT and inner in _TEXTS and (shape[0] == 1 or not content):
            encoding = _TEXTS[inner]
            if encoding in ("utf-16", "utf-32"):
                encoding += "-le" if self.order == "<" else "-be"
            return bytes(content).decode(encoding)
        if not _FIRST_NUMBER <= kind <= _LAST_NUMBER or flags & _COMPLEX or inner not in _NUMBERS:
            raise _Damaged(f"a matrix of class {kind}, which is not read")
        # Written in the smallest type that holds them, whatever the class says.
        numbers = self.numbers(content, inner)
        if len(numbers) != prod(shape):
            raise _Damaged(f"{len(numbers)} numbers for a shape of {shape}")
        return numbers[0].item() if len(numbers) == 1 else numbers.reshape(shape, order="F")

    def numbers(self, content: memoryview, kind: int) -> np.ndarray:
        dtype = np.dtype(self.order + _NUMBERS[kind])
        if len(content) % dtype.itemsize:
            raise _Damaged("it is cut")
        return np.frombuffer(content, dtype)

    def fields(self, data: memoryview, at: int) -> tuple[list[str], int]:
        """Names of the fields of a structure, and the place of what follows."""
        _, content, at = self.element(data, at)
        length = int.from_bytes(content, "little" if self.order == "<" else "big")
        _, names, at = self.element(data, at)
        if not length or not names or len(names) % length:
            raise _Damaged("a structure without fields")
        texts = [bytes(names[start : start + length]) for start in range(0, len(names), length)]
        return [text.partition(b"\0")[0].decode("latin-1") for text in texts], at

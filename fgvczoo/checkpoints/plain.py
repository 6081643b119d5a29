"""Plain values and numpy arrays of what a pickle describes."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np

from fgvczoo.checkpoints.description import Array, DType, Name, View, counts, short
from fgvczoo.checkpoints.refused import Refused

MAX_ENTRIES = 100_000


class _NotPlain(Exception):
    pass


def plain_items(values: dict[str, Any]) -> dict[str, Any]:
    """Those values that are plain or tensors; of a module's attributes the rest are objects, which nobody reads."""
    steps = 0

    def plain(value: Any, depth: int = 0) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_ENTRIES or depth > 8:
            raise _NotPlain
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)) and not isinstance(value, Name):
            return [plain(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {key: plain(item, depth + 1) for key, item in value.items()}
        raise _NotPlain

    found = {}
    for key, value in values.items():
        with suppress(_NotPlain):
            found[key] = value if isinstance(value, View) else plain(value)
    return found


def plain_values(value: Any, depth: int = 0) -> Any:
    """Plain values of what a pickle describes."""
    if depth > 8:
        raise Refused("it is nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, dict):
        return {key: plain_values(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, (Name, DType)):
        return [plain_values(item, depth + 1) for item in value]
    if isinstance(value, Array):
        return _array(value.state)
    raise Refused(f"holds a {short(value)}, which is no plain value")


def _array(state: Any) -> np.ndarray[Any, Any]:
    match state:
        case (1, (tuple() | list()) as shape, DType(code), (False | 0), (str() | bytes()) as content):
            if code not in ("u1", "i1", "i2", "i4", "i8", "f4", "f8"):
                raise Refused(f"an array has the type {short(code)}")
            raw = content.encode("latin-1") if isinstance(content, str) else content
            sides, numbers = counts(shape), np.frombuffer(raw, np.dtype(code).newbyteorder("<"))
            if math.prod(sides) != numbers.size:
                raise Refused(f"an array of shape {sides} has {numbers.size} numbers; it was altered or cut")
            return numbers.reshape(sides)
    raise Refused("an array is not described as numpy does")

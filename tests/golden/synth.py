"""Weights and inputs of the golden cases, regenerated from their names, so that a case holds no arrays but outputs.

Everything depends on name and shape alone: numpy's legacy `RandomState`, whose stream numpy never changes, seeded with
the CRC-32 of the name. The order of the float32 operations is part of the definition.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Shape = Sequence[int]


def _stream(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def array(name: str, shape: Shape) -> NDArray[np.float32]:
    """Standard normal numbers."""
    return _stream(name).standard_normal(tuple(shape)).astype(np.float32)


def integers(name: str, shape: Shape, high: int) -> NDArray[np.int64]:
    """Uniform in 0..high-1."""
    return _stream(name).randint(0, high, size=tuple(shape)).astype(np.int64)


def image(name: str, shape: Shape) -> NDArray[np.float32]:
    """(N, C, H, W): normal numbers on a grid of an eighth of the size, interpolated linearly, corners on corners."""
    *batch, height, width = shape
    coarse = array(name, (*batch, max(2, height // 8), max(2, width // 8)))
    (up, down, low), (left, right, near) = (_between(n, size) for n, size in zip(coarse.shape[2:], (height, width)))
    low = low[:, None]
    upper = coarse[:, :, up][..., left] * (1 - near) + coarse[:, :, up][..., right] * near
    lower = coarse[:, :, down][..., left] * (1 - near) + coarse[:, :, down][..., right] * near
    return (upper * (1 - low) + lower * low).astype(np.float32)


def _between(cells: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For `size` points spread over `cells`: the cell before, the cell after, and how far between."""
    place = np.linspace(0, cells - 1, size)
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, cells - 1), (place - before).astype(np.float32)


def weight(name: str, shape: Shape) -> NDArray[np.float32] | NDArray[np.int64]:
    """The entry `name` of a state dict, scaled such that deep networks neither vanish nor explode."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(tuple(shape), dtype=np.int64)
    normal = array(name, shape)
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(normal)
    if leaf in ("bias", "running_mean"):
        return 0.1 * normal
    if len(shape) == 1:
        return 1.0 + 0.1 * normal if leaf == "weight" else 0.1 * normal
    fan_in = max(1, int(np.prod(shape[1:])))
    return normal * float(np.sqrt(1.0 / fan_in))

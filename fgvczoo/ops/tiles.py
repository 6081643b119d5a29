"""Tiles of work that stay in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Entries of a tile per thread: 1 MiB of float32, as large as or half of common second-level caches.
TILE = 2**18


def tile() -> int:
    return TILE * torch.get_num_threads()


def blocks(length: int, size: int) -> Iterator[slice]:
    """0..length in slices of about equal size, `size` at most, one at least."""
    count = -(-length // max(1, size))
    for k in range(count):
        yield slice(k * length // count, (k + 1) * length // count)

"""Which rows make up which batch, as a function of seed, epoch, process and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from fgvczoo.errors import FgvczooError


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches for training: lists of (epoch, index), so that a sample can be augmented from (seed, epoch, index).

    Every epoch has one order, drawn from (seed, epoch); it is cut into global batches of `batch_size`, and each process
    takes its contiguous equal slice of each of them. So the global batches do not depend on the number of processes.
    The last, smaller batch is kept; with several processes it is cut to a multiple of them (and left out if none
    remains), which is the only difference between one process and several.

    length: number of rows of the split.
    batch_size: of all processes together.
    seed, shuffle: the order of an epoch; rows stay in order where `shuffle` is false.
    world_size, rank: number of processes and the place of this one.

    Attributes that a run sets: `epoch`; and, resumed in the middle of an epoch, `first` (that epoch) and `skip` (how
    many of its batches were already used): they are left out whenever epoch `first` is iterated.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, shuffle: bool = True, world_size: int = 1, rank: int = 0
    ):
        if batch_size < 1:
            raise FgvczooError(f"batch_size={batch_size}; expected at least 1")
        if batch_size % world_size:
            raise FgvczooError(
                f"batch_size={batch_size} is the size over all processes and cannot be split evenly between "
                f"{world_size}; give a multiple of {world_size}"
            )
        self.length, self.batch_size = length, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.world_size, self.rank = world_size, rank
        self.epoch = self.first = self.skip = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length) if self.shuffle else None
        epoch = self.epoch  # a loader reads ahead: what it began stays with its epoch
        for batch in range(self.skip if epoch == self.first else 0, len(self)):
            start = batch * self.batch_size
            share = min(self.batch_size, self.length - start) // self.world_size
            start += self.rank * share
            rows = range(start, start + share) if order is None else order[start : start + share].tolist()
            yield [(epoch, row) for row in rows]

    def __len__(self) -> int:
        """Number of batches of a whole epoch, equal on all processes."""
        full, rest = divmod(self.length, self.batch_size)
        return full + (rest >= self.world_size)


class ExactSampler(Sampler[int]):
    """All rows in order, each once: process `rank` takes a contiguous share, none is padded or repeated.

    Joining the shares in the order of the ranks gives the rows in order. Shares differ by at most one row.
    """

    def __init__(self, length: int, *, world_size: int = 1, rank: int = 0):
        self.rows = range(length * rank // world_size, length * (rank + 1) // world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

"""Which rows make up which batch, as a function of seed, epoch, process and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from fgvczoo.errors import FgvczooError


class TrainBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches for training: lists of (epoch, index), so that a sample can be augmented from (seed, epoch, index); with
    `repeats`, of (epoch, index, number of the repeat).

    What a global batch holds is a function of (seed, epoch, its number); each process takes its contiguous equal slice
    of it. So the global batches do not depend on the number of processes.

    batch_size: of all processes together.
    seed: of what is drawn.
    repeats: how often an image is in a batch, augmented anew each time (Hoffer et al. 2020). An epoch has as many
        batches as without, and so sees a share 1 / `repeats` of the images. They lie side by side, in one process.
    world_size, rank: number of processes and the place of this one.

    Attributes that a run sets: `epoch`; and, resumed in the middle of an epoch, `first` (that epoch) and `skip` (how
    many of its batches were already used): they are left out whenever epoch `first` is iterated.
    """

    def __init__(self, batch_size: int, *, seed: int, world_size: int = 1, rank: int = 0, repeats: int = 1):
        if batch_size < 1:
            raise FgvczooError(f"batch_size={batch_size}; expected at least 1")
        if batch_size % (world_size * repeats) and repeats > 1:
            raise FgvczooError(
                f"batch_size={batch_size} with repeats={repeats}: expected a multiple of {world_size * repeats}, which "
                f"{world_size} processes share"
            )
        if batch_size % world_size:
            raise FgvczooError(
                f"batch_size={batch_size} is the size over all processes and cannot be split evenly between "
                f"{world_size}; give a multiple of {world_size}"
            )
        self.batch_size, self.seed = batch_size, seed
        self.world_size, self.rank, self.repeats = world_size, rank, repeats
        self.epoch = self.first = self.skip = 0

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch = self.epoch  # a loader reads ahead: what it began stays with its epoch
        for batch in self.batches(epoch, range(self.skip if epoch == self.first else 0, len(self))):
            if self.repeats == 1:
                share = len(batch) // self.world_size
                yield [(epoch, row) for row in batch[self.rank * share : (self.rank + 1) * share]]
            else:
                images = batch[: len(batch) // self.repeats]
                share = len(images) // self.world_size
                own = images[self.rank * share : (self.rank + 1) * share]
                yield [(epoch, row, number) for row in own for number in range(self.repeats)]

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches of a whole epoch, equal on all processes."""

    @abstractmethod
    def batches(self, epoch: int, numbers: range) -> Iterator[Sequence[int]]:
        """The rows of the global batches of these numbers."""


class EpochBatchSampler(TrainBatchSampler):
    """Every row once in an epoch: its one order, drawn from (seed, epoch), is cut into global batches.

    The last, smaller batch is kept; with several processes it is cut to a multiple of them (and left out if none
    remains), which is the only difference between one process and several.

    length: number of rows of the split.
    shuffle: rows stay in order where it is false.
    batch_size, seed, world_size, rank: see `TrainBatchSampler`.
    """

    def __init__(self, length: int, batch_size: int, *, shuffle: bool = True, **options: int):
        super().__init__(batch_size, **options)
        self.length, self.shuffle = length, shuffle

    def batches(self, epoch: int, numbers: range) -> Iterator[Sequence[int]]:
        order = self.order(epoch) if self.shuffle else None
        for number in numbers:
            start, stop = number * self.batch_size, min((number + 1) * self.batch_size, self.length)
            yield range(start, stop) if order is None else order[start:stop].tolist()

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size)
        return full + (rest >= self.world_size * self.repeats)


class BalancedBatchSampler(EpochBatchSampler):
    """Every class as often as any other: the order of an epoch, as long as the split, goes through all classes again
    and again, each time in an order drawn anew, and through the images of a class in the same way.

    labels: (N,) of the rows of the split. batch_size, seed, repeats, world_size, rank: see `TrainBatchSampler`.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, **options: int):
        super().__init__(len(labels), batch_size, shuffle=True, **options)
        order = np.argsort(labels, kind="stable")
        self.rows = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []  # of each class

    def order(self, epoch: int) -> np.ndarray:
        # The last number keeps these streams apart from others that are drawn from (seed, epoch).
        generator = np.random.default_rng((self.seed, epoch, 5))
        rounds = -(-self.length // max(len(self.rows), 1))
        of_class = np.stack(
            [
                np.concatenate([generator.permutation(own) for _ in range(-(-rounds // len(own)))])[:rounds]
                for own in self.rows
            ]
        )
        return generator.permuted(of_class, axis=0).T.reshape(-1)[: self.length]


class PKBatchSampler(TrainBatchSampler):
    """P classes with K images each in every global batch (Hermans et al. 2017, section 2), of `batch_size` P x K.

    Each batch is drawn anew from (seed, epoch, its number): classes in random order, K random images of each without
    replacement, until the batch is full. A class with fewer than K images gives those that it has, and a further class
    the rest; where K does not divide the batch size, the last class is cut. Images of a class lie side by side.

    labels: (N,) of the rows of the split.
    batch_size: P x K, over all processes together.
    images_per_class: K.
    batches_per_epoch: by default as many whole batches as the rows would fill, at least one.
    seed, world_size, rank: see `TrainBatchSampler`.

    `FgvczooError` where all classes together cannot fill a batch.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        images_per_class: int,
        *,
        batches_per_epoch: int | None = None,
        **options: int,
    ):
        super().__init__(batch_size, **options)
        order = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(labels[order])) + 1
        self.rows = np.split(order, starts) if len(order) else []  # of each class
        most = sum(min(len(own), images_per_class) for own in self.rows)
        if most < batch_size:
            raise FgvczooError(
                f"batch_size={batch_size} with images_per_class={images_per_class}: {len(self.rows)} classes have "
                f"{most} images for a batch; give a batch_size of at most {most}, or more images_per_class"
            )
        self.images_per_class = images_per_class
        self.length = batches_per_epoch or max(len(labels) // batch_size, 1)

    def batches(self, epoch: int, numbers: range) -> Iterator[Sequence[int]]:
        for number in numbers:
            # The last number keeps these streams apart from others that are drawn from three numbers.
            generator = np.random.default_rng((self.seed, epoch, number, 3))
            batch: list[int] = []
            for place in generator.permutation(len(self.rows)):
                own = self.rows[place]
                batch += generator.permutation(own)[: self.images_per_class].tolist()
                if len(batch) >= self.batch_size:
                    break
            yield batch[: self.batch_size]

    def __len__(self) -> int:
        return self.length


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
